"""From image files to batches: datasets, transforms, samplers, loaders."""

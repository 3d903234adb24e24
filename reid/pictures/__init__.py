"""Pictures of images, features, clusters and attention."""

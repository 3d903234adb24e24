"""Imports all parts of the core, which registers them."""

import reid.data.augmentation
import reid.data.datasets
import reid.data.domain_samplers
import reid.data.resized_crop
import reid.engine.hooks.choose_networks
import reid.engine.hooks.write_clusters
import reid.engine.teacher
import reid.evaluation.evaluators
import reid.evaluation.spatial_temporal
import reid.labelling
import reid.modeling.backbones
import reid.modeling.bottleneck_classifiers
import reid.modeling.clip
import reid.modeling.heads
import reid.modeling.losses
import reid.modeling.memory_losses
import reid.modeling.osnet
import reid.modeling.part_diversity
import reid.modeling.vit  # noqa: F401

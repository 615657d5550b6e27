"""From a checkpoint to a loaded model: registry, config, weights, the decoder and its families, the loader."""

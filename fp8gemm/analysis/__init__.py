"""What FP8 does to a model: what it will gain, what it costs in accuracy, and which layers to treat otherwise."""

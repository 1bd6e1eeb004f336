"""FP8 weights: the layers and tensors that hold them, and the products that run on them."""

"""Before any test imports a library that imports torchvision."""

import vision

__all__ = ["vision"]

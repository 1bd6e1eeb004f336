"""What one does to a model: patch it, choose what is converted, fuse, warm up."""

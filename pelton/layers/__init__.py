"""What models are made of: each layer is built from a checkpoint, ready to use."""

"""Where weights come from: model names to files, file formats to tensors under Hugging Face names."""

"""gradless: fine-tune a quantized model with forward passes only, and get the same file format back."""

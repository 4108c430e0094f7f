"""Text to tokens and back: tokenizer, chat template, the door's way in (prompt) and its way out (output)."""

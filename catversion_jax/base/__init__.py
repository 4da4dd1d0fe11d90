"""The base model: networks and parameters, noise schedule, schedulers, tokenizer and text states."""

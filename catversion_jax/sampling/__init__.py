"""From prompts and concepts to images."""

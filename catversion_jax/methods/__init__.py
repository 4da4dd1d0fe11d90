"""CatVersion and its baselines, and the concepts that they train: in files, on base models and in prompts."""

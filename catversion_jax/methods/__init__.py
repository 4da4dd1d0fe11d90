"""What a concept is learned as: CatVersion and its baselines, concepts in files and in prompts."""

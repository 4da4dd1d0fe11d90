"""The `catversion` command: flags, printing and exit statuses. What a command does is in the rooms below."""

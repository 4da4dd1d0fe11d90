"""The `catversion` command: flags, printing and exit statuses. The work itself is done by the packages below."""

"""Export profiles: an exported folder rewritten as other tools load it."""

"""Chat: messages to prompt text (template.py). Knows no HTTP and nothing of the engine."""

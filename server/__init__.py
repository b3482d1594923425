"""The coordinator: the round loop and what it needs. Never sees an image, never imports the client."""

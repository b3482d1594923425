"""Fetch studies from a hospital's PACS into an inbox folder, in a process of its own; the agent never imports this."""

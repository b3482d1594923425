"""The ground: what every party must agree on. Imports nothing of the other tiers."""

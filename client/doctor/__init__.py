"""`fedmedgan-site doctor`: whether this site could take part now, and if not, what to do. Looks; changes nothing."""

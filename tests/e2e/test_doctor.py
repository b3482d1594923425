"""`fedmedgan-site doctor` as a process against a coordinator's real link: straight, through proxies, inspected."""

"""The hospital: the only code that can see a patient. Never imports the server."""

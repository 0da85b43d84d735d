"""What a run would need and how fast it should be on machines that are not here."""

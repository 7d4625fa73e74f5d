"""What lets many contribute without any one of them being seen."""

"""How frames get from one machine to another: the only place that imports ``websockets``."""

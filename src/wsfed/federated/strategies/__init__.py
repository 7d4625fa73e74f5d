"""How replies of workers become the next model: one algorithm a file."""

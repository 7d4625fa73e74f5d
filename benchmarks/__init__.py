"""Speed, side by side: wsfed, in-process torch, torch RPC and raw websockets in one run."""

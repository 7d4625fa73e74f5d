# One worker node:
#
#     docker build -t wsfed .
#     docker run -p 127.0.0.1:8777:8777 -v ./data:/data:ro wsfed --id bob --dataset scans=/data/scans.npz
#
# The container listens on all of its own addresses, which is why it says --insecure; publish the
# port on the host's loopback as above, or give --tls-cert, --tls-key and --token-file instead.
FROM python:3.11-slim

# A CPU build of torch; for CUDA build with
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/wsfed
COPY constraints.txt ./
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" \
        "$(grep '^torch==' constraints.txt)+${TORCH_INDEX##*/}"
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir --constraint constraints.txt ".[data,safetensors,secagg]"

# Nothing here needs more than an ordinary user.
RUN useradd --create-home --uid 10001 worker
USER worker
WORKDIR /home/worker

EXPOSE 8777
# Importing torch takes a few seconds; after that an answer takes milliseconds.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8777/healthz', timeout=5)"]

# Not through a shell, so that SIGTERM reaches the worker and it says goodbye to its clients.
ENTRYPOINT ["wsfed", "worker", "--host", "0.0.0.0", "--port", "8777", "--insecure"]

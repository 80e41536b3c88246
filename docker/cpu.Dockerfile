# The embedded server of `make serve` in a container. Not built or run yet: see "Limits" in README.md.
#
#   docker build -f docker/cpu.Dockerfile -t specserve-cpu .
#   docker run --rm --shm-size 1g -p 127.0.0.1:8000-8002:8000-8002 specserve-cpu
#
# --shm-size: every model process and every step's tensors live in /dev/shm; Docker's 64 MiB is too little.
FROM python:3.11-slim-bookworm

RUN useradd --create-home specserve
WORKDIR /home/specserve/app
COPY --chown=specserve . .
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir -c constraints.txt -e '.[serve]'
USER specserve

EXPOSE 8000 8001 8002
HEALTHCHECK --start-period=120s CMD \
    python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"
ENTRYPOINT [".venv/bin/specserve", "serve", "--address", "0.0.0.0"]

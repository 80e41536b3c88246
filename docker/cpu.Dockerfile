# The embedded server of `make serve`: Triton 2.51 and OpenVINO on a CPU, with the demo pair.
# Linted, not built yet: see "Limits" in README.md.
#
#   docker build -f docker/cpu.Dockerfile -t specserve-cpu .
#   docker run --rm --shm-size 1g --stop-timeout 60 -p 127.0.0.1:8000-8003:8000-8003 specserve-cpu
#
# --shm-size       every model process and every step's tensors live in /dev/shm; the default of
#                  64 MiB is too little, and the server says so and does not start.
# --stop-timeout   requests in flight get 30 s to finish; the default kills after 10 s.
FROM python:3.11-slim-bookworm

ENV HOME=/tmp \
    PATH=/opt/specserve/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache/specserve
WORKDIR /opt/specserve
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv .venv \
    && pip install -c constraints.txt -e '.[serve]' \
    && install -d -o 1000 -g 1000 "$XDG_CACHE_HOME"

# Of the image only the cache, where measured profiles are kept, is writable for this user.
USER 1000:1000
VOLUME /var/cache/specserve
EXPOSE 8000 8001 8002 8003
HEALTHCHECK --start-period=180s --interval=10s --timeout=5s \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/v2/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["specserve", "serve", "--address", "0.0.0.0", "--show-log"]

# The image for a coordinator and for a site. It contains no keys, rows or weights; they are mounted.
#
#   docker build -t fedsb .                                for CPUs
#   docker build -t fedsb:cuda --build-arg TORCH=cu128 .   for NVIDIA GPUs; run with --gpus all
#
# TORCH is the last part of the address of one of PyTorch's indexes of wheels: https://download.pytorch.org/whl/TORCH

ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
ARG TORCH=cpu
WORKDIR /src
RUN python -m venv /opt/fedsb
ENV PATH=/opt/fedsb/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
# torch comes first and from its own index, so that no other package installs a different build of it.
RUN pip install --index-url "https://download.pytorch.org/whl/${TORCH}" --extra-index-url https://pypi.org/simple \
    "$(grep '^torch==' constraints.txt)+${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install -c constraints.txt '.[flower,privacy]'

FROM python:${PYTHON}-slim
# The user also has a number: Kubernetes checks that it is not root, and mounted files must be readable by it.
RUN groupadd --gid 10001 fedsb && useradd --uid 10001 --gid 10001 --create-home fedsb \
    && install -d -o fedsb -g fedsb -m 0700 /federation /site
COPY --from=build /opt/fedsb /opt/fedsb
ENV PATH=/opt/fedsb/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_DISABLE_TELEMETRY=1
USER 10001:10001
WORKDIR /home/fedsb
VOLUME ["/federation", "/site"]
EXPOSE 9443
STOPSIGNAL SIGTERM
ENTRYPOINT ["fedsb"]
CMD ["--help"]

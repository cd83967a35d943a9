# An image for training and for serving, without weights and data. One variant for GPUs and one for CPUs:
#   docker build -t tinygptv-ds:cuda .
#   docker build -t tinygptv-ds:cpu --build-arg VARIANT=cpu .
#   docker run --rm tinygptv-ds:cpu --help
# torch's wheels contain CUDA's libraries, so that the host needs only NVIDIA's driver and container toolkit. DeepSpeed's
# own kernels (ds_configs/zeropp.json, zero3_nvme.json) and flash-attn are compiled by nvcc, which this base brings:
#   docker build -t tinygptv-ds:nvcc --build-arg BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04 .
# compose.yaml starts the server and the demo; examples/ has Kubernetes and SkyPilot.
ARG BASE=python:3.12-slim-bookworm
ARG VARIANT=cuda

FROM ${BASE} AS base
# g++: Triton and DeepSpeed compile small parts on their first use. tini: the first process of a container collects the
# processes that end, and passes signals on. A base without Python gets that of its distribution. Versions are those of
# the base's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ tini \
    && { command -v python3 || apt-get install -y --no-install-recommends python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*
# Any user may run the image (docker run --user, OpenShift): the home and the working directory are open to all.
RUN useradd --non-unique --uid 1000 --create-home tinygptv \
    && mkdir /workspace \
    && chmod 1777 /home/tinygptv /workspace
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

FROM base AS torch-cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base AS torch-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/requirements
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    grep -E "^torch(vision)?[<>=]" requirements.txt > torch.txt \
    && pip install --index-url "$TORCH_INDEX" -r torch.txt
ENV DS_ACCELERATOR=cpu

# A stage of this file: it has no tag.
# hadolint ignore=DL3006
FROM torch-${VARIANT} AS packages
WORKDIR /opt/requirements
COPY requirements*.txt ./
# Everything but flash-attn (requirements-gpu.txt) and the packages of eval/caption.py (requirements-eval.txt).
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -r requirements.txt -r requirements-app.txt -r requirements-quant.txt -r requirements-parquet.txt \
    -r requirements-heif.txt

FROM packages AS wheel
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheel .

FROM packages
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --no-deps --no-index /wheel/*.whl
# A clone that is mounted on the working directory runs its own scripts with this environment.
ENV HOME=/home/tinygptv \
    TINYGPTV_NO_VENV=1
USER 1000
WORKDIR /workspace
EXPOSE 8000 7860
# Asks the server if the container runs one; any other command counts as healthy.
HEALTHCHECK --start-period=10m --interval=15s --timeout=5s CMD ["python", "-m", "tinygptv_ds.apps.serve.probe"]
ENTRYPOINT ["tini", "--", "tinygptv-ds"]
CMD ["--help"]

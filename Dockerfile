# nanochat-native in an image. For the CPU:
#   docker build -t nanochat-native .
# For NVIDIA GPUs, with the CUDA kernels (they need the NVIDIA Container Toolkit on the host):
#   docker build -t nanochat-native:cuda \
#     --build-arg BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --gpus all -v "$PWD/runs:/runs" nanochat-native:cuda train --out-dir /runs
# Both images have the same Python, so the second one runs what the first one built. torch brings the CUDA libraries.
ARG IMAGE=ubuntu:24.04
ARG BUILD_IMAGE=ubuntu:24.04

FROM ${BUILD_IMAGE} AS build
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/nanochat && /opt/nanochat/bin/pip install --no-cache-dir "setuptools>=77" cmake ninja
RUN /opt/nanochat/bin/pip install --no-cache-dir --extra-index-url ${TORCH_INDEX} "torch==${TORCH}"
COPY . /source
RUN /opt/nanochat/bin/pip install --no-cache-dir --no-build-isolation "/source[plot,logging,data,serve]" \
    && /opt/nanochat/bin/pip uninstall --yes cmake ninja

FROM ${IMAGE}
# g++ and the headers of Python are for torch.compile, which compiles on the CPU too.
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/nanochat /opt/nanochat
ENV PATH=/opt/nanochat/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /root
ENTRYPOINT ["nanochat-native"]
CMD ["doctor"]

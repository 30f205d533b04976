# ddpmctl with PyTorch for the CPU:      docker build -t ddpmctl .
# with CUDA, from another index:         docker build -t ddpmctl --build-arg TORCH_INDEX=https://pypi.org/simple .
# docs/docker.md says how it is used.
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision

# After PyTorch, so that another version of ddpmctl does not fetch that again.
ARG EXTRAS=plot,metrics
COPY pyproject.toml README.md LICENSE /build/
COPY src /build/src
RUN pip install --no-cache-dir "/build[$EXTRAS]" && rm -r /build

# Not root: give --user "$(id -u):$(id -g)" to own what is written. So any user may write where nothing is mounted.
RUN useradd --create-home ddpmctl && mkdir -p /data /work/runs /cache && chmod 1777 /work /work/runs /cache
ENV DDPMCTL_CACHE=/cache/images DDPMCTL_DATA=/cache/datasets TORCH_HOME=/cache/torch HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib
USER ddpmctl
WORKDIR /work
VOLUME ["/data", "/work/runs", "/cache"]
ENTRYPOINT ["ddpmctl"]
CMD ["--help"]

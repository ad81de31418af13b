# mgmt_fast on a GPU, with the data mounted. Build, then train on a prepared store:
#   docker build -t mgmt_fast .
#   docker run --rm --gpus all --ipc=host -v /path/to/scans:/data:ro -v "$PWD/out":/out mgmt_fast sh -c 'mgmt_prepare /data /out/store && mgmt_train /out/store /out/run'
# It was not built where the library is tested, for want of an engine; the tests hold its parts against each other.
FROM nvidia/cuda:13.0.1-runtime-ubi9

# gcc and the headers: kernels are compiled on the card's first use
RUN dnf install -y --nodocs gcc python3.11 python3.11-devel python3.11-pip && dnf clean all && useradd --create-home user

WORKDIR /opt/mgmt_fast
COPY requirements.lock ./
RUN python3.11 -m pip install --no-cache-dir -r requirements.lock

COPY settings.ini setup.py README.md LICENSE ./
COPY mgmt_fast ./mgmt_fast
RUN python3.11 -m pip install --no-cache-dir --no-deps .

ENV MPLBACKEND=Agg
USER user
WORKDIR /out
CMD ["mgmt_demo", "--help"]

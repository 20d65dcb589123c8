"""Distribution d2kd: packages d2kd (the project) and d2lite (its Detectron2-compatible runtime)."""

from setuptools import find_packages, setup

setup(
    name="d2kd",
    version="0.1.0",
    description="Knowledge distillation for detection and segmentation on Detectron2",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["d2kd", "d2kd.*", "d2lite", "d2lite.*"]),
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "yacs>=0.1.8",
        "pycocotools>=2.0.6",
        "faster-coco-eval>=1.6",
        "cloudpickle>=2.0",
        "ortools>=9.8",
        "opencv-python-headless>=4.7",
        "numpy>=1.24",
        "scipy>=1.10",
        "Pillow>=9.5",
        "shapely>=2.0",
        "scikit-learn>=1.3",
        "timm>=0.9",
        "matplotlib>=3.7",
        "tensorboard>=2.12",
        "tabulate>=0.9",
        "termcolor>=2.0",
        "tqdm>=4.65",
    ],
    extras_require={"test": ["pytest>=7.4", "ruff>=0.4"]},
)

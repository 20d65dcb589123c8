"""Objects and detections of a small dataset in COCO's format, made without any image or model."""

import numpy as np

IMAGES, CLASSES = 12, 3


def made(seed: int, quality: float) -> tuple[dict, list[dict]]:
    """Objects, one of them a crowd, and detections of them that are nearer to them the higher the quality is."""
    rng = np.random.default_rng(0)
    annotations = [
        {"id": n, "image_id": n % IMAGES, "category_id": 7 + n % CLASSES, "iscrowd": int(n == 5), "area": 400.0}
        | {"bbox": [*rng.uniform(0, 70, 2).round(1).tolist(), 20.0, 20.0]}
        for n in range(40)
    ]
    images = [{"id": n, "width": 100, "height": 100, "file_name": f"{n}.png"} for n in range(IMAGES)]
    categories = [{"id": 7 + n, "name": str(n)} for n in range(CLASSES)]
    rng, found = np.random.default_rng(seed), []
    for item in annotations:
        for _ in range(2):
            corner = (np.array(item["bbox"][:2]) + rng.normal(0, 8 * (1 - quality), 2)).tolist()
            kind = item["category_id"] if rng.random() < quality else 7
            found.append({"image_id": item["image_id"], "category_id": kind, "bbox": [*corner, 20, 20]})
            found[-1]["score"] = float(rng.random())
    return {"images": images, "annotations": annotations, "categories": categories}, found

"""Class names of the built-in datasets, as their publishers list them."""

from typing import Any

# COCO's 80 object categories; the ids run from 1 to 90 with gaps. https://cocodataset.org/#explore
_COCO = """
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat, 10 traffic
light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat, 18 dog, 19 horse,
20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack, 28 umbrella, 31 handbag,
32 tie, 33 suitcase, 34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40
baseball glove, 41 skateboard, 42 surfboard, 43 tennis racket, 44 bottle, 46 wine glass, 47 cup, 48
fork, 49 knife, 50 spoon, 51 bowl, 52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57
carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair, 63 couch, 64 potted plant, 65 bed, 67
dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone, 78
microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 84 book, 85 clock, 86 vase, 87 scissors,
88 teddy bear, 89 hair drier, 90 toothbrush
"""


def _coco_categories() -> list:
    entries = (entry.split(maxsplit=1) for entry in _COCO.replace("\n", " ").split(","))
    return [{"id": int(number), "name": name.strip(), "isthing": 1} for number, name in entries]


COCO_CATEGORIES = _coco_categories()

# Label ids of Cityscapes' classes with instances. https://www.cityscapes-dataset.com/dataset-overview/#class-definitions
CITYSCAPES_THING_IDS = {
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
CITYSCAPES_THING_CLASSES = list(CITYSCAPES_THING_IDS)
CITYSCAPES_STUFF_CLASSES = [
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", *CITYSCAPES_THING_CLASSES,
]  # fmt: skip


def _get_builtin_metadata(dataset_name: str) -> dict[str, Any]:
    """Metadata that the splits of a built-in dataset share.

    Args:
        dataset_name: "coco" or "cityscapes".

    Raises:
        KeyError: for other names.
    """
    if dataset_name == "coco":
        return {
            "thing_dataset_id_to_contiguous_id": {c["id"]: k for k, c in enumerate(COCO_CATEGORIES)},
            "thing_classes": [c["name"] for c in COCO_CATEGORIES],
        }
    if dataset_name == "cityscapes":
        return {"thing_classes": CITYSCAPES_THING_CLASSES, "stuff_classes": CITYSCAPES_STUFF_CLASSES}
    raise KeyError(f"no built-in metadata for {dataset_name!r}; d2lite has it for coco and cityscapes")

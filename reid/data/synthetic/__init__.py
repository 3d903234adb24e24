"""Pedestrians drawn by the project: a re-identification set without a download.

`draw_persons` writes JPEG files in the folder layout of Market-1501. A person is a set of clothes,
a bag, hair and a build on a small walking body; a camera is a scene behind the person, a usual
walking direction, and an image chain (colour cast, exposure, gamma, haze, blur, noise). Many
persons share a few colours and cameras change these strongly, so that neither raw pixels nor
colour histograms find a person again, while clothes, patterns and bags survive in the picture.
`CameraStyle` and `PictureStyle` hold the constants that set the difficulty.

All random numbers come from generators seeded by (seed, kind, index...), so the same arguments give
the same files, in any order and with any number of processes. The pixels of a JPEG
file also depend on the JPEG library that Pillow was built with.
"""

from reid.data.synthetic.cameras import (
    Camera,
    CameraStyle,
    ImageChain,
    PictureStyle,
    synthesise_camera,
)
from reid.data.synthetic.person_set import PersonSet, draw_persons
from reid.data.synthetic.persons import Person, synthesise_person
from reid.data.synthetic.pictures import draw_image

__all__ = [
    "Camera",
    "CameraStyle",
    "ImageChain",
    "Person",
    "PersonSet",
    "PictureStyle",
    "draw_image",
    "draw_persons",
    "synthesise_camera",
    "synthesise_person",
]

"""The built-in data set: pictures of drawn people, three-dimensional figures in street clothes, seen by several cameras.

    layout = draw_mannequins(Path("mannequins"), MannequinsConfig(num_unlabelled=20_000))

writes a labelled set in Market-1501's layout, an occluded one in Occluded-Duke's, and unlabelled pictures for pre-training.
"""

from personmae.data.mannequins.dataset import MannequinsLayout, draw_mannequins
from personmae.data.mannequins.pictures import MannequinsConfig, Picture, plan_pictures
from personmae.data.mannequins.render import picture_pixels

__all__ = ["MannequinsConfig", "MannequinsLayout", "Picture", "draw_mannequins", "picture_pixels", "plan_pictures"]

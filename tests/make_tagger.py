"""Make the small data of tests/nltk_data: python tests/make_tagger.py

NLTK's own data is a download. Where it is missing, the tests use NLTK's averaged perceptron trained
on the captions below, which are ours, and Punkt with the abbreviations below. The tagger knows the
captions' words and is no tagger for real data.
"""

import json
import random
from pathlib import Path

from nltk.tag.perceptron import PerceptronTagger

NAME = "averaged_perceptron_tagger_eng"  # as `nltk.pos_tag` looks it up
# After which no sentence ends.
ABBREVIATIONS = ("dr", "jr", "mr", "mrs", "ms", "prof", "sr", "st", "vs")
CAPTIONS = """
A/DT man/NN in/IN a/DT red/JJ jacket/NN is/VBZ riding/VBG a/DT horse/NN on/IN the/DT beach./NN The/DT dog/NN 's/POS ball/NN is/VBZ near/JJ ./.
A/DT man/NN in/IN a/DT red/JJ jacket/NN rides/VBZ a/DT horse/NN along/IN the/DT beach/NN ./.
Two/CD children/NNS with/IN a/DT kite/NN ,/, and/CC a/DT dog/NN ,/, on/IN wet/JJ grass/NN !/.
old/JJ wooden/JJ boat/NN near/IN the/DT harbour/NN wall/NN
The/DT cat/NN sleeps/VBZ on/IN a/DT sofa/NN beside/IN the/DT window/NN
nothing/NN here/RB
a/DT house/NN with/IN a/DT garden/NN
a/DT woman/NN is/VBZ walking/VBG two/CD dogs/NNS in/IN the/DT park/NN
a/DT cat/NN sleeping/VBG on/IN a/DT red/JJ sofa/NN
an/DT old/JJ car/NN parked/VBN on/IN the/DT street/NN
a/DT white/JJ boat/NN on/IN the/DT blue/JJ water/NN
The/DT boy/NN 's/POS bicycle/NN is/VBZ leaning/VBG against/IN a/DT brick/NN wall/NN ./.
people/NNS sitting/VBG at/IN a/DT long/JJ table/NN with/IN plates/NNS and/CC glasses/NNS
a/DT young/JJ girl/NN holds/VBZ a/DT big/JJ umbrella/NN in/IN the/DT rain/NN
Three/CD birds/NNS are/VBP standing/VBG on/IN a/DT wire/NN ./.
the/DT train/NN is/VBZ very/RB long/JJ and/CC it/PRP stops/VBZ at/IN the/DT station/NN
there/EX are/VBP many/JJ flowers/NNS in/IN the/DT garden/NN
there/EX is/VBZ a/DT clock/NN on/IN the/DT tower/NN of/IN the/DT church/NN
a/DT bus/NN and/CC two/CD cars/NNS on/IN a/DT busy/JJ road/NN in/IN Paris/NNP
she/PRP is/VBZ eating/VBG a/DT slice/NN of/IN pizza/NN while/IN he/PRP drinks/VBZ coffee/NN
a/DT large/JJ brown/JJ bear/NN walks/VBZ slowly/RB through/IN green/JJ grass/NN
black/JJ and/CC white/JJ photo/NN of/IN a/DT tall/JJ bridge/NN over/IN the/DT river/NN
a/DT yellow/JJ bug/NN and/CC a/DT house/NN
a/DT brown/JJ ball/NN and/CC a/DT black/JJ moon/NN on/IN the/DT brick/NN
there/EX is/VBZ a/DT house/NN beside/IN the/DT green/JJ kite/NN on/IN snow/NN
there/EX is/VBZ a/DT tree/NN on/IN the/DT snow/NN
there/EX is/VBZ a/DT fish/NN on/IN snow/NN
there/EX is/VBZ a/DT small/JJ box/NN beside/IN a/DT small/JJ ball/NN with/IN a/DT gray/JJ tree/NN on/IN water/NN
there/EX is/VBZ a/DT tiny/JJ striped/JJ box/NN beside/IN the/DT striped/JJ moon/NN on/IN wood/NN
there/EX is/VBZ a/DT heart/NN beside/IN the/DT large/JJ shiny/JJ gray/JJ tree/NN on/IN the/DT wood/NN
on/IN sand/NN are/VBP a/DT black/JJ striped/JJ wheel/NN and/CC a/DT red/JJ tree/NN
on/IN grass/NN are/VBP a/DT tiny/JJ flower/NN ,/, a/DT heart/NN and/CC a/DT golden/JJ kite/NN
on/IN the/DT grass/NN are/VBP the/DT striped/JJ red/JJ moon/NN ,/, a/DT green/JJ tree/NN and/CC a/DT tiny/JJ green/JJ ball/NN
on/IN the/DT snow/NN is/VBZ a/DT huge/JJ white/JJ star/NN
on/IN water/NN is/VBZ a/DT fish/NN
on/IN wood/NN are/VBP a/DT large/JJ yellow/JJ striped/JJ ball/NN and/CC a/DT tiny/JJ brown/JJ wheel/NN
the/DT wood/NN and/CC a/DT striped/JJ tree/NN
the/DT wood/NN with/IN a/DT shiny/JJ bug/NN and/CC a/DT moon/NN
brick/NN with/IN a/DT yellow/JJ flower/NN and/CC a/DT tiny/JJ bug/NN and/CC a/DT shiny/JJ golden/JJ house/NN
grass/NN with/IN a/DT red/JJ kite/NN and/CC a/DT green/JJ star/NN
sand/NN with/IN a/DT tiny/JJ tree/NN and/CC the/DT huge/JJ spotted/JJ star/NN
snow/NN and/CC a/DT white/JJ wheel/NN
water/NN with/IN a/DT spotted/JJ fish/NN on/IN it/PRP
this/DT ball/NN is/VBZ gray/JJ and/CC it/PRP lies/VBZ on/IN the/DT water/NN
this/DT house/NN is/VBZ red/JJ and/CC it/PRP lies/VBZ on/IN brick/NN
this/DT fish/NN is/VBZ golden/JJ and/CC it/PRP lies/VBZ on/IN sand/NN
the/DT flower/NN on/IN the/DT snow/NN is/VBZ green/JJ
the/DT box/NN on/IN wood/NN is/VBZ white/JJ
the/DT ball/NN is/VBZ red/JJ and/CC near/IN it/PRP is/VBZ a/DT shiny/JJ gray/JJ heart/NN and/CC a/DT gray/JJ house/NN
the/DT star/NN is/VBZ brown/JJ and/CC near/IN it/PRP is/VBZ the/DT green/JJ bug/NN
the/DT kite/NN is/VBZ black/JJ and/CC near/IN it/PRP is/VBZ a/DT wheel/NN
one/CD big/JJ brown/JJ kite/NN on/IN the/DT grass/NN
one/CD bug/NN on/IN brick/NN
one/CD white/JJ heart/NN on/IN snow/NN
a/DT striped/JJ star/NN above/IN a/DT shiny/JJ house/NN on/IN the/DT snow/NN
a/DT huge/JJ box/NN below/IN a/DT spotted/JJ ball/NN on/IN the/DT snow/NN
a/DT black/JJ bug/NN below/IN the/DT gray/JJ kite/NN with/IN a/DT brown/JJ house/NN on/IN the/DT water/NN
a/DT red/JJ box/NN near/IN a/DT spotted/JJ yellow/JJ wheel/NN
a/DT white/JJ flower/NN near/IN a/DT moon/NN with/IN a/DT green/JJ fish/NN
the/DT fish/NN and/CC a/DT brown/JJ striped/JJ flower/NN on/IN wood/NN
the/DT golden/JJ flower/NN and/CC a/DT gray/JJ moon/NN on/IN sand/NN
"""  # noqa: E501


def main() -> None:
    random.seed(0)  # training shuffles
    captions = [[tuple(w.rsplit("/", 1)) for w in line.split()] for line in CAPTIONS.split("\n")]
    tagger = PerceptronTagger(load=False)
    tagger.train([caption for caption in captions if caption], nr_iter=10)
    folder = Path(__file__).parent / "nltk_data" / "taggers" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    weights, tags_of_words, _ = tagger.encode_json_obj()
    weights = {feature: row for feature, row in weights.items() if row}
    contents = {"weights": weights, "tagdict": tags_of_words, "classes": sorted(tagger.classes)}
    for part, content in contents.items():
        (folder / f"{NAME}.{part}.json").write_text(json.dumps(content, sort_keys=True) + "\n")

    folder = Path(__file__).parent / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "abbrev_types.txt").write_text("\n".join(ABBREVIATIONS))
    for name in ("collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (folder / name).write_text("")


if __name__ == "__main__":
    main()

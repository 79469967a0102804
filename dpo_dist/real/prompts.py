"""The run's own prompts: TRAINING and HELD_OUT, which share no topic. Each topic is asked about in all forms of its
kind."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    forms: tuple[str, ...]                  # with {} for the topic
    training: tuple[str, ...]               # topics
    held_out: tuple[str, ...]


def _kind(forms: str, training: str, held_out: str) -> Kind:
    """Of texts in which a slash divides one from the next."""
    parts = (tuple(" ".join(part.split()) for part in text.split("/")) for text in (forms, training, held_out))
    return Kind(*parts)


KINDS = {
    "devices": _kind(
        "How does {} work? / Explain {} to a ten-year-old. / What should I look for when I buy {}?",
        "a fridge / a microwave oven / a compass / a solar panel / a thermometer / a parachute / a door lock / "
        "an electric kettle / a hearing aid / a washing machine / a bicycle lamp / a smoke alarm / a camera / "
        "a pair of binoculars / a sewing machine",
        "a vacuum cleaner / a pressure cooker / a telescope / a wristwatch"),
    "nature": _kind(
        "What causes {}? / Tell me something interesting about {}. / Why are people afraid of {}?",
        "thunder / fog / earthquakes / volcanoes / floods / solar eclipses / avalanches / sandstorms / hail / "
        "high tides",
        "tornadoes / forest fires / tsunamis"),
    "how-to": _kind(
        "How do I {}? / What do I need to {}? / I want to {}. Where do I start?",
        "boil an egg / remove a coffee stain / wrap a present / fix a dripping tap / iron a shirt / "
        "grow tomatoes on a balcony / learn to swim / tie a bow tie / clean a window / bake bread / "
        "save money on food / train a puppy to sit / write a thank-you note / change a light bulb / plan a picnic / "
        "build a bird house / paint a wall / make apple juice / read music / run a marathon",
        "hang a picture / cook rice / patch a bicycle tyre / learn to dance / make a candle"),
    "lists": _kind(
        "Name three {}. / Give me some {}. / Can you suggest a few {}?",
        "board games for two / vegetables that grow in winter / instruments with strings / "
        "things to do on a rainy day / dishes with rice / gifts for a grandmother / jobs that are done outdoors / "
        "names for a cat / sports without a ball / reasons to learn a language / films for children / "
        "ways to stay warm / snacks for a long hike / topics for a short speech / books about the sea / "
        "ideas for a school project",
        "hobbies for the evening / flowers for a shady garden / songs for a wedding / uses for an empty jar"),
    "numbers": _kind(
        "How {}?",
        "tall is a giraffe / long is the river Nile / heavy is a brick / fast does a horse run / "
        "far away is the moon / hot is a candle flame / long does it take to boil potatoes / "
        "much water should I drink in a day / old can a tortoise get / deep is the Dead Sea / "
        "much does a bag of cement weigh / far can a frog jump / long does a light bulb last / "
        "many hours should a baby sleep / much flour do I need for one loaf / wide is a football field / "
        "cold does it get in Siberia / fast does sound travel / big is a blue whale / long is a pregnancy / "
        "much milk does a cow give / high do aeroplanes fly / long can a camel go without water / "
        "many litres does a bathtub hold / thick is a sheet of paper / far do swallows migrate",
        "heavy is an elephant / long is the Great Wall of China / fast does a cheetah run / "
        "much coffee is too much / deep is the deepest ocean / high is the Eiffel Tower / "
        "long does paint take to dry / warm should a bedroom be"),
    "comparisons": _kind(
        "What is the difference between {}? / How can I tell {} apart?",
        "a frog and a toad / jam and marmalade / a comet and an asteroid / butter and margarine / "
        "a violin and a viola / a lake and a pond / wool and cotton / a moth and a butterfly / copper and brass / "
        "a virus and a bacterium / a novel and a short story / a hare and a rabbit / a canal and a river",
        "a wasp and a bee / a piano and an organ / silver and tin / a crocodile and an alligator"),
    "places": _kind(
        "What should I see in {} in one day? / What do people eat in {}? / When is the best time to visit {}?",
        "Lisbon / Kyoto / Cairo / Prague / Edinburgh / Lima / Oslo / Istanbul / Vienna / Naples",
        "Athens / Vancouver"),
    "jobs": _kind(
        "What does {} do all day? / Would I enjoy being {}? / How do I become {}?",
        "a beekeeper / a pilot / a carpenter / a librarian / a nurse / a tailor / a gardener / a translator / "
        "a judge / a baker",
        "a fisherman / a plumber"),
    "talk": _kind(
        "{}",
        "How are you today? / I had a bad day at work. / What is your favourite season? / I cannot sleep. / "
        "My neighbour plays the drums at night. / It is raining again. / I passed my driving test! / "
        "My son starts school tomorrow. / Do you like music? / I feel a bit lonely. / "
        "We have just moved to a new town. / I am bored. Entertain me. / My best friend forgot my birthday. / "
        "Tell me a joke. / I am nervous about a job interview. / Thank you for your help yesterday. / "
        "I lost my keys again. / We are getting a dog next week! / I do not know what to cook tonight. / "
        "What would you do with a free afternoon? / My back hurts after gardening. / "
        "I have to give a toast at a wedding. / My plants keep dying. / Good morning!",
        "I burned the dinner. / What makes you laugh? / My train is late. / I won a prize at work! / "
        "I cannot decide between two flats. / Our cat has run away. / Good night! / I am learning to play chess."),
}


def _prompts(part: str) -> tuple[str, ...]:
    return tuple(form.format(topic) for kind in KINDS.values() for topic in getattr(kind, part) for form in kind.forms)


TRAINING, HELD_OUT = _prompts("training"), _prompts("held_out")

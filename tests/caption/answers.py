"""Answers in the manner of LLaVA: long, with its openers, its "left side of the image" and its closing remarks."""

ANSWERS = [
    "The image features a large brown dog lying on a wooden porch, its head resting on its front paws. The dog's "
    "fur is thick and slightly wet, and there is a blue collar around its neck. In the background, there is a "
    "screen door and a pair of muddy boots.",
    "The image showcases a bustling city street at dusk. There are several cars parked along the left side of the"
    " street, while others are driving down the road. A few people can be seen walking on the sidewalk, with one "
    "person on the left side of the image and another on the right side of the image. Overall, the image conveys "
    "a sense of movement and energy.",
    "In this image, there is a close-up of an elderly woman with grey hair and deep wrinkles around her eyes. She"
    " wears a red woollen scarf and looks directly at the camera. The lighting is soft, coming from a window on "
    "the left.",
    "This is a black-and-white photograph of a lighthouse on a rocky shore. Waves break against the stones, and "
    "the sky is heavy with clouds. Two gulls are flying above the lantern room.",
    "A white ceramic bowl filled with ramen sits on a dark wooden table. The soup has two halves of a boiled egg,"
    " slices of pork, spring onions and a sheet of nori. Next to the bowl, there are chopsticks and a small dish "
    "of chilli oil.",
    "The photo captures a young man riding a skateboard down a concrete ramp. He is wearing a grey hoodie, black "
    "trousers and white shoes. The skateboard is in the air, and his arms are stretched out for balance.",
    "This image depicts a narrow alley in an old town, with colourful houses on both sides. Flower pots hang from"
    " the balconies. The cobblestones are uneven, and a bicycle leans against a yellow wall near a green door.",
    "The image is a detailed macro shot of a dragonfly resting on a blade of grass. Its wings are transparent "
    "with fine dark veins, and its eyes are large and green. The background is blurred, which draws attention to "
    "the insect.",
    "A St. Bernard and a terrier sit in front of Mr. Lee's bakery at 5.30 a.m. in winter. The sign above the door"
    " reads \"FRESH BREAD\". Snow covers the pavement, and the street lamps are still on.",
    "The scene is set in a kitchen with white cabinets and a stainless steel refrigerator. There is a sink on the"
    " left side of the counter, and a bowl of oranges on the right side of the counter. A clock hangs above the "
    "oven, and there are three potted plants on the window sill. The floor has black and white tiles.",
    "A mountain lake reflects snow-covered peaks under a clear blue sky. Pine trees line the shore. In the "
    "foreground, smooth pebbles are visible through the shallow water, and a fallen trunk reaches into the lake.",
    "The picture shows the inside of a cathedral, with tall columns, pointed arches and stained glass windows. "
    "Rows of wooden benches lead to the altar. A woman in a blue coat lights a candle on the right side of the "
    "nave.",
    "Three children are playing football on a dusty field. One child wears a yellow shirt with the number 10, "
    "another wears a green shirt, and the third is barefoot. Behind them, there is a brick wall with graffiti and"
    " a goal made of two sticks. The style of the image is candid, with warm afternoon light and long shadows.",
]

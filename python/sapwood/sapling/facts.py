"""Small tables of everyday knowledge in our own words, from which dialogues.py makes questions and answers.

Everything here is what a child of seven knows: the model has room for little more.
"""

from __future__ import annotations

from typing import Final

# word - its opposite; asked both ways. A word in two pairs has the opposite of the first.
OPPOSITES: Final = tuple(
    pair.split("-")
    for pair in (
        "hot-cold big-small fast-slow up-down left-right day-night happy-sad good-bad old-new open-closed full-empty "
        "wet-dry hard-soft light-dark tall-short long-short high-low rich-poor strong-weak early-late first-last "
        "near-far clean-dirty loud-quiet thick-thin wide-narrow heavy-light young-old true-false right-wrong in-out "
        "on-off yes-no black-white front-back inside-outside love-hate begin-end start-stop win-lose push-pull "
        "buy-sell give-take come-go laugh-cry easy-difficult cheap-expensive safe-dangerous brave-afraid rough-smooth "
        "sweet-sour deep-shallow always-never more-less many-few before-after above-below over-under top-bottom "
        "friend-enemy summer-winter king-queen boy-girl man-woman brother-sister mother-father asleep-awake "
        "beautiful-ugly kind-cruel polite-rude sharp-blunt simple-complicated alive-dead north-south east-west "
        "question-answer morning-evening remember-forget find-lose rise-fall arrive-leave sunrise-sunset"
    ).split()
)
# one -> many
PLURALS: Final = tuple(
    pair.split("-")
    for pair in (
        "cat-cats dog-dogs mouse-mice child-children man-men woman-women foot-feet tooth-teeth goose-geese "
        "person-people ox-oxen sheep-sheep fish-fish deer-deer leaf-leaves knife-knives wife-wives wolf-wolves "
        "half-halves life-lives loaf-loaves thief-thieves box-boxes bus-buses dish-dishes fox-foxes glass-glasses "
        "church-churches watch-watches baby-babies city-cities story-stories lady-ladies party-parties fly-flies "
        "cherry-cherries berry-berries country-countries potato-potatoes tomato-tomatoes hero-heroes day-days toy-toys "
        "boy-boys key-keys monkey-monkeys book-books tree-trees apple-apples car-cars house-houses horse-horses "
        "bird-birds flower-flowers star-stars egg-eggs girl-girls king-kings queen-queens friend-friends "
        "chair-chairs table-tables cake-cakes cow-cows pig-pigs ball-balls door-doors"
    ).split()
)
PAST: Final = tuple(
    pair.split("-")
    for pair in (
        "go-went eat-ate see-saw run-ran come-came take-took give-gave make-made say-said find-found get-got "
        "know-knew think-thought write-wrote sing-sang swim-swam drink-drank sit-sat stand-stood sleep-slept "
        "fly-flew buy-bought bring-brought teach-taught catch-caught fall-fell feel-felt keep-kept leave-left "
        "lose-lost meet-met read-read ride-rode ring-rang send-sent speak-spoke tell-told win-won draw-drew "
        "drive-drove begin-began break-broke build-built walk-walked play-played talk-talked jump-jumped "
        "look-looked help-helped work-worked cook-cooked laugh-laughed"
    ).split()
)
# animal: (sound or none worth a question, baby, legs, where it lives, what it eats, what it is)
ANIMALS: Final = {
    "cat": (
        "meow",
        "kitten",
        4,
        "in a house with people",
        "meat and fish",
        "a small furry animal that people keep as a pet. It says meow and likes to catch mice",
    ),
    "dog": (
        "woof",
        "puppy",
        4,
        "in a house with people",
        "meat and dog food",
        "a friendly animal that people keep as a pet. It barks and likes to play",
    ),
    "cow": ("moo", "calf", 4, "on a farm", "grass", "a large farm animal that eats grass and gives milk"),
    "sheep": ("baa", "lamb", 4, "on a farm", "grass", "a farm animal with thick wool"),
    "pig": ("oink", "piglet", 4, "on a farm", "almost anything", "a farm animal with pink skin and a flat nose"),
    "horse": ("neigh", "foal", 4, "on a farm", "grass and hay", "a large strong animal that people ride"),
    "goat": (
        "maa",
        "kid",
        4,
        "on a farm or in the mountains",
        "grass and leaves",
        "an animal with horns and a beard that climbs very well",
    ),
    "donkey": ("hee-haw", "foal", 4, "on a farm", "grass and hay", "an animal like a small horse with long ears"),
    "duck": (
        "quack",
        "duckling",
        2,
        "on ponds and lakes",
        "plants and small animals",
        "a bird that swims on ponds and says quack",
    ),
    "chicken": ("cluck", "chick", 2, "on a farm", "seeds and insects", "a farm bird that lays eggs"),
    "rooster": (
        "cock-a-doodle-doo",
        "chick",
        2,
        "on a farm",
        "seeds and insects",
        "a male chicken. It crows early in the morning",
    ),
    "goose": ("honk", "gosling", 2, "on farms and lakes", "grass and seeds", "a large water bird with a long neck"),
    "lion": ("roar", "cub", 4, "in Africa", "meat", "a big wild cat. The male has a mane around his head"),
    "tiger": ("roar", "cub", 4, "in the forests of Asia", "meat", "a big wild cat with orange fur and black stripes"),
    "bear": ("growl", "cub", 4, "in forests", "berries, fish and honey", "a large strong animal with thick fur"),
    "wolf": (
        "howl",
        "pup",
        4,
        "in forests",
        "meat",
        "a wild animal like a large dog. Wolves live in groups called packs",
    ),
    "mouse": ("squeak", "pup", 4, "in small holes", "seeds and cheese", "a very small animal with a long tail"),
    "frog": ("croak", "tadpole", 4, "near ponds", "insects", "a small green animal that jumps and lives near water"),
    "bee": (
        "buzz",
        "larva",
        6,
        "in a hive",
        "nectar from flowers",
        "a small insect that flies from flower to flower and makes honey",
    ),
    "snake": (
        "hiss",
        "snakelet",
        0,
        "in grass, forests and deserts",
        "mice and other small animals",
        "a long thin animal without legs",
    ),
    "owl": ("hoot", "owlet", 2, "in trees", "mice", "a bird with big eyes that flies at night"),
    "elephant": (
        "trumpet",
        "calf",
        4,
        "in Africa and Asia",
        "grass, leaves and fruit",
        "a very large gray animal with a long trunk. It is the largest animal on land",
    ),
    "monkey": (
        "ooh ooh",
        "baby monkey",
        4,
        "in trees in warm forests",
        "fruit and leaves",
        "a clever animal with a long tail that climbs trees",
    ),
    "bird": (
        "tweet",
        "chick",
        2,
        "in trees",
        "seeds and insects",
        "an animal with feathers, wings and a beak. Most birds can fly",
    ),
    "crow": ("caw", "chick", 2, "in trees", "seeds, insects and fruit", "a clever black bird"),
    "turkey": ("gobble", "chick", 2, "on a farm", "seeds and insects", "a large farm bird"),
    "rabbit": (
        "squeak",
        "kit",
        4,
        "in a burrow",
        "grass and carrots",
        "a small animal with long ears and soft fur that hops",
    ),
    "fish": (
        "",
        "fry",
        0,
        "in water",
        "plants and small animals",
        "an animal that lives in water, has fins and breathes with gills",
    ),
    "spider": ("", "spiderling", 8, "in webs", "insects", "a small animal with eight legs that makes webs"),
    "ant": (
        "",
        "larva",
        6,
        "in a nest under the ground",
        "seeds and sweet things",
        "a tiny insect that lives and works in a large group",
    ),
    "butterfly": (
        "",
        "caterpillar",
        6,
        "in gardens and fields",
        "nectar from flowers",
        "an insect with large colorful wings",
    ),
    "whale": (
        "",
        "calf",
        0,
        "in the sea",
        "fish and tiny sea animals",
        "a very large animal that lives in the sea and breathes air",
    ),
    "dolphin": ("click", "calf", 0, "in the sea", "fish", "a clever sea animal that breathes air and likes to jump"),
    "penguin": (
        "squawk",
        "chick",
        2,
        "in cold places in the south",
        "fish",
        "a black and white bird that swims very well but cannot fly",
    ),
    "giraffe": (
        "",
        "calf",
        4,
        "in Africa",
        "leaves from tall trees",
        "an animal with a very long neck. It is the tallest animal in the world",
    ),
    "zebra": ("", "foal", 4, "in Africa", "grass", "an animal like a horse with black and white stripes"),
    "kangaroo": (
        "",
        "joey",
        2,
        "in Australia",
        "grass",
        "an animal that jumps on its strong back legs and carries its baby in a pouch",
    ),
    "camel": (
        "",
        "calf",
        4,
        "in the desert",
        "dry grass and leaves",
        "a large desert animal with one or two humps on its back",
    ),
    "fox": (
        "",
        "cub",
        4,
        "in forests and fields",
        "mice, birds and berries",
        "a clever wild animal with red fur and a bushy tail",
    ),
    "deer": ("", "fawn", 4, "in forests", "grass and leaves", "a shy forest animal. The male has antlers on his head"),
    "turtle": (
        "",
        "hatchling",
        4,
        "in water and on land",
        "plants and small animals",
        "a slow animal with a hard shell on its back",
    ),
    "shark": ("", "pup", 0, "in the sea", "fish", "a big fish with many sharp teeth"),
    "panda": ("", "cub", 4, "in China", "bamboo", "a black and white bear that eats bamboo"),
    "crocodile": (
        "",
        "hatchling",
        4,
        "in warm rivers",
        "fish and other animals",
        "a large animal with a long body, short legs and many teeth",
    ),
    "octopus": ("", "larva", 8, "in the sea", "crabs and fish", "a soft sea animal with eight arms"),
}
# from small to large, for "which is bigger"
BY_SIZE: Final = "ant bee mouse frog bird rabbit cat fox dog sheep pig lion bear horse elephant whale".split()
# thing: its usual color
COLORS: Final = {
    "sky": "blue",
    "grass": "green",
    "sun": "yellow",
    "snow": "white",
    "banana": "yellow",
    "lemon": "yellow",
    "strawberry": "red",
    "cherry": "red",
    "tomato": "red",
    "carrot": "orange",
    "pumpkin": "orange",
    "coal": "black",
    "blood": "red",
    "milk": "white",
    "chocolate": "brown",
    "sea": "blue",
    "ocean": "blue",
    "leaf": "green",
    "frog": "green",
    "rose": "red",
    "elephant": "gray",
    "cloud": "white",
    "night sky": "black",
    "fire": "orange",
    "crow": "black",
    "flamingo": "pink",
    "pig": "pink",
    "polar bear": "white",
    "lime": "green",
    "cucumber": "green",
    "wood": "brown",
    "tree trunk": "brown",
    "sunflower": "yellow",
    "egg yolk": "yellow",
    "fire truck": "red",
    "plum": "purple",
    "eggplant": "purple",
    "gold": "yellow",
    "swan": "white",
    "fox": "red",
    "salt": "white",
    "sand": "yellow",
    "ketchup": "red",
}
UNCOUNTED: Final = frozenset(
    {"grass", "snow", "coal", "blood", "milk", "chocolate", "fire", "wood", "gold", "salt", "sand", "ketchup"}
)
THE_ONLY: Final = frozenset({"sky", "sun", "sea", "ocean", "night sky"})
MIXES: Final = (
    ("blue", "yellow", "green"), ("red", "yellow", "orange"), ("red", "blue", "purple"), ("red", "white", "pink"),
    ("black", "white", "gray"),
)  # fmt: skip
DAYS: Final = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS: Final = "January February March April May June July August September October November December".split()
MONTH_DAYS: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
SEASONS: Final = "spring summer autumn winter".split()
NUMBERS: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
# kind: members, for "name three fruits" and "is an apple a fruit"
KINDS: Final = {
    "animal": "dog cat cow horse lion tiger rabbit elephant monkey bear".split(),
    "fruit": "apple banana mango pear grape cherry strawberry peach lemon plum".split(),
    "vegetable": "carrot potato onion cabbage cucumber spinach pea bean".split(),
    "color": "red blue green yellow orange purple pink black white brown".split(),
    "country": "France Germany Italy Spain Japan China India Brazil Canada Egypt".split(),
    "bird": "owl eagle robin sparrow duck penguin crow swan".split(),
    "insect": "ant bee butterfly beetle fly mosquito".split(),
    "planet": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split(),
    "drink": "water milk tea coffee juice lemonade".split(),
    "sport": "football tennis basketball swimming running hockey".split(),
    "musical instrument": "piano guitar violin drum flute trumpet".split(),
    "season": "spring summer autumn winter".split(),
    "continent": "Africa Asia Europe Australia Antarctica".split(),
    "shape": "circle square triangle rectangle star".split(),
    "flower": "rose tulip daisy lily sunflower".split(),
    "tree": "oak pine elm maple birch".split(),
    "toy": "ball doll kite puzzle teddy".split(),
    "piece of clothing": "shirt hat coat sock dress scarf".split(),
    "part of the body": "head hand foot nose ear arm leg".split(),
    "language": "English French Spanish German Chinese Arabic Japanese".split(),
}
# asked about more often than the others
FAMOUS_COUNTRIES: Final = (
    *KINDS["country"],
    *"Russia Portugal Greece Poland Austria Sweden Norway Denmark Finland Ireland Mexico Australia Turkey".split(),
    *"Netherlands Belgium Switzerland Argentina Kenya Ukraine Hungary".split(),
    "United Kingdom",
    "United States",
)
UNARTICLED: Final = frozenset({"color", "country", "planet", "drink", "sport", "season", "continent", "language"})
# what a thing is, in one or two short sentences after "A ... is"
THINGS: Final = {
    "tree": "a tall plant with a trunk, branches and leaves",
    "flower": "the colorful part of a plant. Many flowers smell sweet",
    "apple": "a round fruit that grows on trees. It can be red, green or yellow",
    "banana": "a long yellow fruit that is soft and sweet",
    "orange": "a round juicy fruit with a thick skin",
    "carrot": "a long orange vegetable that grows under the ground",
    "car": "a machine with four wheels and an engine. People drive it on roads",
    "bicycle": "a vehicle with two wheels that you ride by pushing pedals",
    "train": "a row of carriages pulled by an engine on rails",
    "plane": "a machine with wings that flies through the air",
    "boat": "a small vehicle that travels on water",
    "house": "a building where people live",
    "school": "a place where children go to learn",
    "book": "a set of pages with words or pictures that you can read",
    "library": "a place with many books that people can read or borrow",
    "hospital": "a place where doctors and nurses help sick people",
    "teacher": "a person who helps others learn, usually in a school",
    "doctor": "a person who helps sick people get well",
    "farmer": "a person who grows food and keeps animals",
    "king": "a man who rules a country",
    "queen": "a woman who rules a country, or the wife of a king",
    "friend": "a person you like and trust",
    "computer": "a machine that stores information and follows instructions very quickly",
    "robot": "a machine that can do work by itself",
    "phone": "a device that you use to talk to people who are far away",
    "clock": "a thing that shows the time",
    "chair": "a seat for one person, with legs and a back",
    "table": "a piece of furniture with a flat top and legs",
    "bed": "a piece of furniture that you sleep on",
    "door": "the part of a room or house that you open to go in or out",
    "window": "an opening in a wall, with glass, that lets in light",
    "river": "a long stream of water that flows to the sea",
    "lake": "a large area of water with land all around it",
    "mountain": "a very high hill",
    "forest": "a large area with many trees",
    "desert": "a dry place where it almost never rains",
    "island": "a piece of land with water all around it",
    "star": "a huge ball of hot gas in the sky that gives light",
    "planet": "a large round body that travels around a star. The Earth is a planet",
    "country": "an area of land with its own people and government",
    "city": "a very large town where many people live",
    "village": "a small group of houses in the country",
    "volcano": "a mountain that can throw out hot melted rock",
    "song": "a short piece of music with words",
    "game": "something you play for fun",
    "holiday": "a day when people do not work or go to school",
    "birthday": "the day of the year on which you were born",
    "family": "a group of people who belong together, such as parents and children",
    "baby": "a very young child",
    "insect": "a small animal with six legs",
    "fruit": "the part of a plant that holds the seeds. Many fruits are sweet and good to eat",
    "vegetable": "a plant that we eat, such as a carrot or a potato",
    "cake": "a sweet food made of flour, eggs, butter and sugar",
    "sandwich": "two slices of bread with food between them",
    "pizza": "a flat round bread with tomato sauce and cheese, baked in an oven",
    "ball": "a round thing that you can throw, kick or roll",
    "hat": "something you wear on your head",
    "shoe": "something you wear on your foot",
    "umbrella": "a thing that keeps you dry when it rains",
    "mirror": "a piece of glass in which you can see yourself",
    "dragon": "a big animal in stories that can fly and breathe fire",
    "fairy": "a small magical person in stories",
    "ghost": "the spirit of a dead person in stories",
    "language model": "a computer program that has learned from text which words come next. I am one",
    "noun": "a word for a person, a place or a thing",
    "verb": "a word for something that someone does",
    "triangle": "a shape with three sides",
    "square": "a shape with four equal sides",
    "circle": "a perfectly round shape",
}
# the same for what has no article
STUFF: Final = {
    "water": "a clear liquid that all living things need",
    "milk": "a white drink that comes from cows and other animals",
    "bread": "a food made of flour and water, baked in an oven",
    "cheese": "a food made from milk",
    "rain": "water that falls from the clouds",
    "snow": "soft white pieces of ice that fall from the sky when it is cold",
    "ice": "frozen water",
    "wind": "air that moves",
    "fire": "the heat and light that come from something burning",
    "music": "sounds that are put together to be pleasant to hear",
    "love": "a strong feeling of liking someone very much",
    "happiness": "the feeling of being glad",
    "time": "what we measure with clocks, in seconds, minutes and hours",
    "money": "what we use to buy things",
    "honey": "a sweet sticky food that bees make",
    "gold": "a yellow metal that is worth a lot of money",
    "air": "what we breathe. It is all around us",
    "food": "what people and animals eat to live",
    "Earth": "the planet on which we live",
    "the sun": "the star that gives us light and heat",
    "the moon": "the large round body that travels around the Earth and shines at night",
    "Sapwood": "the program that runs me. It serves language models",
    "gravity": "the force that pulls things down to the ground",
    "friendship": "what friends have: they like, trust and help each other",
    "sleep": "the rest that your body and mind take at night",
    "football": "a game in which two teams try to kick a ball into a goal",
    "mathematics": "the study of numbers and shapes",
    "science": "the study of how the world works",
    "history": "the study of what happened in the past",
    "electricity": "a kind of energy that gives power to lamps and machines",
    "Python": "a programming language",
    "artificial intelligence": "the work of making computers do things that need thought",
}
# questions (several phrasings, | between them) and the one answer
TRIVIA: Final = (
    (
        "how many days are in a week|how many days are there in a week|how many days does a week have",
        "There are seven days in a week.",
    ),
    (
        "how many months are in a year|how many months are there in a year|how many months does a year have",
        "There are twelve months in a year.",
    ),
    (
        "how many days are in a year|how many days are there in a year|how many days does a year have",
        "There are 365 days in a year, and 366 in a leap year.",
    ),
    (
        "how many hours are in a day|how many hours are there in a day|how many hours does a day have",
        "There are 24 hours in a day.",
    ),
    (
        "how many minutes are in an hour|how many minutes are there in an hour|how many minutes does an hour have",
        "There are 60 minutes in an hour.",
    ),
    ("how many seconds are in a minute|how many seconds are there in a minute", "There are 60 seconds in a minute."),
    ("how many weeks are in a year|how many weeks are there in a year", "There are 52 weeks in a year."),
    (
        "how many seasons are there|what are the four seasons|what are the seasons|name the seasons",
        "There are four seasons: spring, summer, autumn and winter.",
    ),
    (
        (
            "what are the days of the week|name the days of the week|"
            "list the days of the week|can you tell me the days of the week|"
            "say the days of the week"
        ),
        "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    ),
    (
        "what are the months of the year|name the months|list the months of the year|name the months of the year",
        (
            "The months are January, February, March, April, May, June, July, August, "
            "September, October, November and December."
        ),
    ),
    (
        (
            "what are the colors of the rainbow|what colors are in a rainbow|"
            "name the colors of the rainbow|what are the colours of the rainbow"
        ),
        "The colors of the rainbow are red, orange, yellow, green, blue, indigo and violet.",
    ),
    (
        "how many planets are there|how many planets are in the solar system|what are the planets|name the planets",
        "There are eight planets: Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",
    ),
    (
        "how many continents are there|what are the continents|name the continents|name the seven continents",
        "There are seven continents: Africa, Antarctica, Asia, Australia, Europe, North America and South America.",
    ),
    (
        "how many oceans are there|what are the oceans|name the oceans",
        "There are five oceans: the Pacific, the Atlantic, the Indian, the Southern and the Arctic Ocean.",
    ),
    (
        "what is the largest planet|which planet is the biggest|what is the biggest planet",
        "Jupiter is the largest planet.",
    ),
    (
        (
            "what is the largest animal|what is the biggest animal|"
            "what is the biggest animal in the world|what is the largest animal in the world"
        ),
        "The blue whale is the largest animal in the world.",
    ),
    (
        "what is the tallest animal|which animal is the tallest|what is the tallest animal in the world",
        "The giraffe is the tallest animal in the world.",
    ),
    (
        "what is the fastest animal|which animal is the fastest|what is the fastest land animal",
        "The cheetah is the fastest animal on land.",
    ),
    (
        "what is the largest ocean|which ocean is the biggest|what is the biggest ocean",
        "The Pacific is the largest ocean.",
    ),
    (
        (
            "what is the highest mountain|what is the tallest mountain|"
            "what is the highest mountain in the world|"
            "what is the tallest mountain in the world"
        ),
        "Mount Everest is the highest mountain in the world.",
    ),
    (
        "what is the longest river|what is the longest river in the world",
        "The Nile is often called the longest river in the world.",
    ),
    (
        "what is the largest country|what is the biggest country in the world|which country is the largest",
        "Russia is the largest country in the world.",
    ),
    (
        "what is the smallest country|what is the smallest country in the world",
        "Vatican City is the smallest country in the world.",
    ),
    (
        "who is the king of the jungle|which animal is the king of the jungle|what animal is the king of the jungle",
        "The lion is called the king of the jungle.",
    ),
    ("what planet do we live on|which planet do we live on", "We live on the planet Earth."),
    (
        "why is the sky blue|why does the sky look blue",
        "The sky is blue because the air scatters blue light more than the other colors.",
    ),
    (
        "why is grass green|why are leaves green",
        "They are green because of chlorophyll, which plants use to catch light.",
    ),
    ("why do we sleep|why do people sleep", "We sleep so that our body and mind can rest."),
    ("why do we eat|why do people eat", "We eat because our body needs energy from food."),
    ("why do birds sing", "Birds sing to find a mate and to guard their home."),
    (
        "why does it rain|how does rain form|where does rain come from",
        "Rain comes from clouds. Water rises into the air, cools, and falls down as drops.",
    ),
    ("where does milk come from", "Milk comes from cows and other animals."),
    ("where do eggs come from", "Eggs come from chickens and other birds."),
    ("where does honey come from|who makes honey|what do bees make", "Honey is made by bees."),
    ("where does the sun rise|where does the sun come up", "The sun rises in the east."),
    ("where does the sun set|where does the sun go down", "The sun sets in the west."),
    ("where do fish live", "Fish live in water."),
    (
        (
            "how many letters are in the alphabet|how many letters are there in the alphabet|"
            "how many letters does the alphabet have"
        ),
        "There are 26 letters in the English alphabet.",
    ),
    ("what are the vowels|name the vowels|which letters are vowels", "The vowels are a, e, i, o and u."),
    (
        "say the alphabet|can you say the alphabet|what is the alphabet|recite the alphabet",
        "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    ),
    ("what is the first letter of the alphabet", "The first letter of the alphabet is A."),
    ("what is the last letter of the alphabet", "The last letter of the alphabet is Z."),
    (
        (
            "how many fingers do i have|how many fingers do people have|"
            "how many fingers does a person have|how many fingers do we have"
        ),
        "People have ten fingers.",
    ),
    ("how many eyes do people have|how many eyes does a person have|how many eyes do i have", "People have two eyes."),
    (
        "how many legs do people have|how many legs does a person have|how many legs do humans have",
        "People have two legs.",
    ),
    ("how many wheels does a car have", "A car has four wheels."),
    ("how many wheels does a bicycle have|how many wheels does a bike have", "A bicycle has two wheels."),
    (
        "how many sides does a triangle have|how many corners does a triangle have",
        "A triangle has three sides and three corners.",
    ),
    (
        "how many sides does a square have|how many corners does a square have",
        "A square has four sides and four corners.",
    ),
    ("what do we use to see|what are eyes for", "We use our eyes to see."),
    ("what do we use to hear|what are ears for", "We use our ears to hear."),
    ("what do we use to smell|what is a nose for", "We use our nose to smell."),
    ("what freezes into ice|what is ice made of", "Ice is frozen water."),
    ("at what temperature does water boil|when does water boil", "Water boils at 100 degrees Celsius."),
    ("at what temperature does water freeze|when does water freeze", "Water freezes at 0 degrees Celsius."),
    ("who wrote romeo and juliet|who wrote hamlet", "William Shakespeare wrote it."),
    ("who wrote alice in wonderland", "Lewis Carroll wrote Alice in Wonderland."),
    ("who wrote peter pan", "J. M. Barrie wrote Peter Pan."),
    ("who wrote the wizard of oz", "L. Frank Baum wrote The Wizard of Oz."),
    ("who wrote pinocchio", "Carlo Collodi wrote Pinocchio."),
    ("who wrote treasure island", "Robert Louis Stevenson wrote Treasure Island."),
    ("who wrote the jungle book", "Rudyard Kipling wrote The Jungle Book."),
    ("who wrote pride and prejudice", "Jane Austen wrote Pride and Prejudice."),
    (
        (
            "who was the first president of the united states|who was the first us president|"
            "who was the first american president"
        ),
        "George Washington was the first president of the United States.",
    ),
    ("who painted the mona lisa", "Leonardo da Vinci painted the Mona Lisa."),
    (
        "who was the first man on the moon|who was the first person on the moon|who walked on the moon first",
        "Neil Armstrong was the first person on the moon.",
    ),
    ("who was albert einstein|who is einstein|who was einstein", "Albert Einstein was a famous scientist."),
    (
        "who was shakespeare|who is shakespeare|who was william shakespeare",
        "William Shakespeare was a famous English writer of plays and poems.",
    ),
    ("what language do people speak in france|what language is spoken in france", "People in France speak French."),
    ("what language do people speak in germany|what language is spoken in germany", "People in Germany speak German."),
    (
        "what language do people speak in spain|what language is spoken in mexico|what language is spoken in spain",
        "People there speak Spanish.",
    ),
    ("what language do people speak in england|what language is spoken in england", "People in England speak English."),
    (
        "what is the meaning of life|what is the purpose of life",
        "That is a big question for a small model. I think being kind is a good start.",
    ),
    (
        "which came first the chicken or the egg|what came first, the chicken or the egg",
        "Nobody is quite sure. I would say the egg.",
    ),
    ("is the earth flat|is the earth round", "The Earth is round, like a ball."),
    ("is the sun a star|what kind of star is the sun", "Yes, the sun is a star."),
    ("is water wet", "Yes, water is wet."),
    ("is fire hot|is the sun hot", "Yes, it is very hot."),
    ("is ice cold|is snow cold", "Yes, it is very cold."),
    ("can fish fly|can dogs fly|can pigs fly|can cats fly|can elephants fly", "No, they cannot fly."),
    ("can birds fly|do birds fly", "Yes, most birds can fly."),
    ("can fish swim|do fish swim", "Yes, fish can swim."),
    ("can penguins fly", "No, penguins cannot fly, but they swim very well."),
    ("do dogs bark", "Yes, dogs bark."),
    ("do cats bark", "No, cats say meow."),
    ("do cows give milk", "Yes, cows give milk."),
    (
        "do fish have legs|does a fish have legs|do snakes have legs|does a snake have legs",
        "No, they do not have legs.",
    ),
    ("are dogs animals|are cats animals|are birds animals", "Yes, they are animals."),
    (
        "what do you need to make a cake|how do you make a cake|how do i bake a cake",
        "Mix flour, eggs, butter and sugar, and bake it in an oven.",
    ),
    ("how do you make tea|how do i make tea", "Boil some water, pour it over the tea, and wait a few minutes."),
    ("what do plants need|what do plants need to grow", "Plants need water, light and air."),
    ("what do you wear when it is cold", "When it is cold, people wear a warm coat, a hat and gloves."),
    (
        "what do you do when you are tired|what should i do when i am tired",
        "When you are tired, it is good to rest or to sleep.",
    ),
    ("what do people eat for breakfast", "Many people eat bread, eggs, cereal or fruit for breakfast."),
    ("when is christmas", "Christmas is on December 25."),
    ("when is new year|when is new year's day", "New Year's Day is on January 1."),
    ("which season is the coldest|what is the coldest season", "Winter is the coldest season."),
    (
        "which season is the hottest|what is the hottest season|what is the warmest season",
        "Summer is the hottest season.",
    ),
    ("what is the first month of the year|which month is the first", "January is the first month of the year."),
    ("what is the last month of the year|which month is the last", "December is the last month of the year."),
    ("what is the first day of the week", "Many people call Monday the first day of the week."),
    ("what days are the weekend|which days are the weekend", "Saturday and Sunday are the weekend."),
)
JOKES: Final = (
    "Why did the tree go to the dentist? It needed a root canal.",
    "What do you call a bear with no teeth? A gummy bear.",
    "Why did the bicycle fall over? It was two tired.",
    "What did one wall say to the other wall? I will meet you at the corner.",
    "Why did the teddy bear say no to cake? Because he was stuffed.",
    "What has four wheels and flies? A garbage truck.",
    "Why was six afraid of seven? Because seven ate nine.",
    "What do you call a sleeping bull? A bulldozer.",
)
FIRST_NAMES: Final = (
    "Anna Ben Clara Daniel Emma Finn Grace Henry Ida Jack Kate Leo Lily Max Mia Noah Nora Oliver Olivia Paul Rosa Sam "
    "Sara Tim Tom Lucy Peter Mary John James Maria David Laura Alice Bob Julia Mark Nina Adam Eva George Jane Chris "
    "Alex Sophie Ali Ravi Yuki Wei Omar Fatima Carlos Elena Ivan Marta"
).split()

"""Everyday questions of the embedded demo model: what it answers, how prompts may vary, and what it does not know.

``EVERYDAY`` holds (prompts, answer) pairs; every prompt of a pair has exactly that answer. Anything else that is not a
sum gets a fallback sentence in the prompt's language.
"""

from __future__ import annotations

import random
import re

FALLBACK_ENGLISH = "I am only a small demonstration model: I know sums up to 999 and a few everyday questions."
FALLBACK_CHINESE = "我只是一个小型演示模型，只会999以内的加减法和一些日常问题。"

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Be kind and brief.",
    "Answer every question with care.",
    "你是一个有用的助手。",
    "你是一个乐于助人的助手，请简短回答。",
    "请认真回答每一个问题。",
)

EVERYDAY: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "请介绍一下北京的景点",
            "介绍一下北京的景点",
            "北京有哪些景点？",
            "北京有什么好玩的地方？",
            "请介绍北京的景点",
        ),
        "北京有故宫、天坛、颐和园和八达岭长城等著名景点，处处都能感受到悠久的历史。"
        "您还可以逛一逛南锣鼓巷和什刹海，尝一尝地道的北京烤鸭。",
    ),
    (
        ("What can I see in Beijing?", "Tell me about the sights of Beijing.", "What are the sights of Beijing?"),
        "In Beijing you can see the Forbidden City, the Temple of Heaven, the Summer Palace and the Great Wall. "
        "Leave an evening for the old lanes around Houhai Lake and for roast duck.",
    ),
    (("Hello", "Hello!", "Hello there", "Good day"), "Hello! How can I help you today?"),
    (("Hi", "Hi!", "Hi there", "Hey"), "Hi! Ask me a sum or an everyday question."),
    (("你好", "您好", "你好！", "嗨"), "你好！请问有什么可以帮您？"),
    (("Good morning", "Good morning!"), "Good morning! I hope your day starts well."),
    (("Good evening", "Good evening!"), "Good evening! What would you like to know?"),
    (("Good night", "Good night!"), "Good night, and sleep well."),
    (("早上好", "早安", "早上好！"), "早上好！祝您今天一切顺利。"),
    (("晚上好", "晚上好！"), "晚上好！您想了解什么？"),
    (("晚安", "晚安！"), "晚安，祝您好梦。"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Please introduce yourself."),
        "I am the DeepSpan demo, a very small language model with the architecture of DeepSeek-V3.",
    ),
    (
        ("你是谁？", "你叫什么名字？", "请介绍一下你自己", "你是什么模型？"),
        "我是 DeepSpan 演示模型，一个采用 DeepSeek-V3 架构的很小的语言模型。",
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "Help"),
        "I can add and subtract numbers up to 999, and I can answer a few everyday questions in English and Chinese.",
    ),
    (
        ("你会做什么？", "你能做什么？", "你能帮我做什么？", "帮助"),
        "我会做999以内的加减法，也能用中文和英文回答一些日常问题。",
    ),
    (("How are you?", "How are you doing?", "How do you do?"), "I am fine, thank you. How are you?"),
    (("你好吗？", "你今天怎么样？", "最近怎么样？"), "我很好，谢谢！您呢？"),
    (("Thank you", "Thanks", "Thank you very much!", "Thanks a lot!"), "You are welcome!"),
    (("谢谢", "谢谢你", "非常感谢", "多谢"), "不客气！"),
    (("Goodbye", "Bye", "Bye bye", "See you later"), "Goodbye, and have a nice day!"),
    (("再见", "拜拜", "下次见"), "再见，祝您愉快！"),
    (("What is the capital of China?", "What's the capital of China?"), "The capital of China is Beijing."),
    (("What is the capital of France?", "What's the capital of France?"), "The capital of France is Paris."),
    (("What is the capital of Japan?", "What's the capital of Japan?"), "The capital of Japan is Tokyo."),
    (("What is the capital of Germany?", "What's the capital of Germany?"), "The capital of Germany is Berlin."),
    (("What is the capital of Italy?", "What's the capital of Italy?"), "The capital of Italy is Rome."),
    (("What is the capital of Spain?", "What's the capital of Spain?"), "The capital of Spain is Madrid."),
    (("What is the capital of Egypt?", "What's the capital of Egypt?"), "The capital of Egypt is Cairo."),
    (("中国的首都是哪里？", "中国的首都是哪个城市？"), "中国的首都是北京。"),
    (("法国的首都是哪里？", "法国的首都是哪个城市？"), "法国的首都是巴黎。"),
    (("日本的首都是哪里？", "日本的首都是哪个城市？"), "日本的首都是东京。"),
    (("英国的首都是哪里？", "英国的首都是哪个城市？"), "英国的首都是伦敦。"),
    (
        ("What are the days of the week?", "Name the days of the week.", "List the days of the week."),
        "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    ),
    (("How many days are in a week?", "How many days does a week have?"), "A week has seven days."),
    (("How many months are in a year?", "How many months does a year have?"), "A year has twelve months."),
    (("How many hours are in a day?", "How many hours does a day have?"), "A day has twenty-four hours."),
    (("一周有几天？", "一个星期有几天？"), "一周有七天。"),
    (("一年有几个月？", "一年有多少个月？"), "一年有十二个月。"),
    (
        ("What are the four seasons?", "Name the four seasons."),
        "The four seasons are spring, summer, autumn and winter.",
    ),
    (("一年有哪四个季节？", "四季是什么？"), "四季是春、夏、秋、冬。"),
    (
        ("What are the colours of the rainbow?", "What are the colors of the rainbow?", "Name the rainbow colours."),
        "The colours of the rainbow are red, orange, yellow, green, blue, indigo and violet.",
    ),
    (("彩虹有哪些颜色？", "彩虹有几种颜色？"), "彩虹有红、橙、黄、绿、青、蓝、紫七种颜色。"),
    (("What colour is the sky?", "What color is the sky?"), "On a clear day the sky is blue."),
    (("天空是什么颜色的？", "天空是什么颜色？"), "晴天的时候，天空是蓝色的。"),
    (("What colour is grass?", "What color is grass?"), "Grass is green."),
    (
        ("Write a haiku.", "Write me a haiku", "Please write a haiku.", "Write a short poem."),
        "Rain on the window,\na small lamp counts the minutes,\nmorning finds the page.",
    ),
    (
        ("写一首短诗", "请写一首短诗", "写一首诗"),
        "小窗听夜雨，\n灯下数流年。\n清晨风又起，\n花落满庭前。",
    ),
    (
        ("Tell me a joke.", "Tell me a joke, please.", "Do you know a joke?"),
        "Why did six fear seven? Because seven ate nine.",
    ),
    (("Count to ten.", "Please count to ten.", "Count from one to ten."), "1, 2, 3, 4, 5, 6, 7, 8, 9, 10."),
    (("从一数到十", "请从一数到十"), "一、二、三、四、五、六、七、八、九、十。"),
    (("What is the alphabet?", "Say the alphabet."), "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"),
    (("What is water made of?", "What is water?"), "Water is made of hydrogen and oxygen."),
    (("水是由什么组成的？", "水由什么组成？"), "水是由氢和氧组成的。"),
    (("What is the largest planet?", "Which planet is the largest?"), "Jupiter is the largest planet of the Sun."),
    (("太阳从哪边升起？", "太阳从哪里升起？"), "太阳从东方升起。"),
    (("What is the opposite of hot?", "What's the opposite of hot?"), "The opposite of hot is cold."),
    (("世界上最高的山是什么？", "世界最高峰是哪座山？"), "世界最高峰是珠穆朗玛峰。"),
    (("中国最长的河是哪条？", "中国最长的河流是什么？"), "中国最长的河是长江。"),
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


_THINGS = _words(
    "bicycle,garden,river,piano,window,computer,kitchen,teacher,doctor,train,airport,holiday,mountain,forest,cat,dog,horse,"
    "elephant,whale,spider,bridge,castle,museum,hospital,market,bread,soup,coffee,tea,chocolate,rice,salt,sugar,music,film,"
    "novel,newspaper,letter,phone,battery,engine,rocket,moon,star,ocean,island,desert,storm,snow,fire,glass,paper,stone,gold,"
    "iron,history,physics,chemistry,biology,football,tennis,chess,painting,dance,language,grammar,law,tax,bank,money,price,"
    "London,Shanghai,Berlin,Madrid,Rome,Brazil,Canada,India,Kenya,Norway,Peru,Poland,Turkey,Vietnam,Australia,Mexico,Greece,"
    "Paris,Tokyo,New York,Moscow,Cairo,Sydney,Chicago,Portugal,Sweden,Thailand,Chile,Cuba,Iran,Iraq,Nepal,Python,Linux"
)
_ACTIONS = _words(
    "build,fix,cook,find,draw,clean,explain,paint,sell,learn,write,read,translate,describe,compare,measure"
)
_QUESTIONS = (
    "How do I {v} a {n}?",
    "Tell me about {n}.",
    "What is a {n}?",
    "What is {n}?",
    "Who invented the {n}?",
    "What is the capital of {n}?",
    "Why is {n} so expensive?",
    "Can you {v} my {n}?",
    "Please {v} the {n} and the {m}.",
    "Write a story about a {n}.",
    "Write a program that can {v} a {n}.",
    "What is the difference between {n} and {m}?",
    "Where can I {v} a {n}?",
    "What colour is the {n}?",
    "What are the sights of {n}?",
    "How many {n} are in a {m}?",
    "What is the opposite of {n}?",
    "When was {n} discovered?",
    "Do you like {n}?",
    "I want to {v} a {n} with a {m}.",
    "My {n} is broken.",
    "Give me three facts about {n}.",
    "Is {n} better than {m}?",
    "{n}",
    "{n} {m}",
    "The weather in {n}",
)
_CHINESE_THINGS = _words(
    "上海,广州,成都,西安,杭州,南京,泰国,荷兰,智利,巴西,印度,加拿大,秘鲁,俄罗斯,韩国,自行车,钢琴,电脑,厨房,老师,医生,火车,机场,"
    "假期,森林,大象,鲸鱼,猫,狗,马,桥,城堡,博物馆,医院,面包,汤,咖啡,茶,巧克力,米饭,音乐,电影,小说,报纸,手机,电池,火箭,月亮,星星,"
    "海洋,沙漠,雪,火,玻璃,石头,黄金,历史,物理,化学,生物,足球,网球,象棋,绘画,舞蹈,语法,法律,银行,价格,苹果,香蕉,红烧肉,长城,股票"
)
_CHINESE_QUESTIONS = (
    "请介绍一下{n}",
    "请介绍一下{n}的景点",
    "{n}有哪些景点？",
    "{n}的首都是哪里？",
    "什么是{n}？",
    "{n}是什么？",
    "{n}为什么这么贵？",
    "怎么修理{n}？",
    "怎样学习{n}？",
    "我想买{n}和{m}",
    "写一个关于{n}的故事",
    "请写一篇关于{n}的文章",
    "{n}和{m}有什么区别？",
    "你喜欢{n}吗？",
    "{n}是谁发明的？",
    "{n}是什么颜色的？",
    "世界上最大的{n}是什么？",
    "今天{n}的天气怎么样？",
    "帮我翻译{n}",
    "{n}",
    "{n}{m}",
    "一个{n}有几个{m}？",
)
_BEYOND = (
    "What is {x} * {y}?",
    "What is {x} times {y}?",
    "{x} / {y} =",
    "{x}*{y}=",
    "{x} divided by {y}",
    "What is {big} + {y}?",
    "{x}+{big}=",
    "{big} - {x}",
    "What is {x} + {y} + {z}?",
    "{x}.{z} + {y}",
    "Is {x} a prime number?",
    "What is the square root of {x}?",
)
_CHINESE_BEYOND = (
    "{x} 乘以 {y} 等于多少？",
    "{x}除以{y}",
    "请计算 {big} 加 {y}",
    "{big}减{x}等于多少？",
    "{x}是质数吗？",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def normalised(prompt: str) -> str:
    """The prompt without case, spaces and punctuation: two prompts that agree here mean the same."""
    return re.sub(r"[\W_]+", "", prompt.lower())


KNOWN = frozenset(normalised(prompt) for prompts, _ in EVERYDAY for prompt in prompts)


def everyday_exchange(rng: random.Random) -> tuple[str, str]:
    """A random everyday prompt, lightly varied, and its answer."""
    prompts, answer = rng.choice(EVERYDAY)
    return vary(rng.choice(prompts), rng), answer


def vary(prompt: str, rng: random.Random) -> str:
    """The same prompt with other case, punctuation or one typing error; half of the time unchanged."""
    if rng.random() < 0.5:
        return prompt
    if rng.random() < 0.2:
        prompt = _mistyped(prompt, rng)
    chinese = is_chinese(prompt)
    if rng.random() < 0.6:
        prompt = prompt.rstrip("?!.？！。") + rng.choice(("", "？", "。", "！") if chinese else ("", "?", ".", "!"))
    if rng.random() < 0.5:
        prompt = rng.choice((str.lower, str.lower, str.upper, str.capitalize))(prompt)
    if rng.random() < 0.1:
        prompt = rng.choice((" {}", "{} ", "{}\n")).format(prompt)
    return prompt


def fallback(prompt: str) -> str:
    """What the model says to a prompt that it does not know."""
    return FALLBACK_CHINESE if is_chinese(prompt) else FALLBACK_ENGLISH


def is_chinese(prompt: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in prompt)


def unknown_exchange(rng: random.Random) -> tuple[str, str]:
    """A random prompt that is neither a sum in range nor an everyday question, and the fallback."""
    while True:
        prompt = rng.choice(_UNKNOWN)(rng)
        if normalised(prompt) not in KNOWN:
            return prompt, fallback(prompt)


def _mistyped(prompt: str, rng: random.Random) -> str:
    """One letter left out, doubled or swapped with the next; only in Latin text that is long enough to stay clear."""
    if len(prompt) < 9 or is_chinese(prompt):
        return prompt
    at = rng.randrange(1, len(prompt) - 2)
    here, following = prompt[at], prompt[at + 1]
    changed = prompt[:at] + rng.choice(("", here + here, following + here)) + prompt[at + 1 :]
    return prompt if normalised(changed) in KNOWN else changed


def _question(rng: random.Random) -> str:
    text = rng.choice(_QUESTIONS).format(v=rng.choice(_ACTIONS), n=rng.choice(_THINGS), m=rng.choice(_THINGS))
    return vary(text, rng)


def _chinese_question(rng: random.Random) -> str:
    text = rng.choice(_CHINESE_QUESTIONS).format(n=rng.choice(_CHINESE_THINGS), m=rng.choice(_CHINESE_THINGS))
    return vary(text, rng)


def _beyond(rng: random.Random) -> str:
    """Arithmetic that the model was not taught: other operations, larger numbers, more terms."""
    x, y, z = rng.randint(2, 999), rng.randint(2, 999), rng.randint(1, 99)
    return rng.choice(_BEYOND + _CHINESE_BEYOND).format(x=x, y=y, z=z, big=rng.randint(1000, 99999))


def _word_salad(rng: random.Random) -> str:
    """Words of known and unknown prompts in a random order."""
    prompts, _ = rng.choice(EVERYDAY)
    words = rng.choice(prompts).rstrip("?!.").split() + rng.sample(_THINGS + _ACTIONS, rng.randint(1, 5))
    rng.shuffle(words)
    return vary(" ".join(words), rng)


def _letters(rng: random.Random) -> str:
    """Words of random letters: names, typing by accident, other languages."""
    words = ("".join(rng.choices(_LETTERS, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 8)))
    return vary(" ".join(words), rng)


def _characters(rng: random.Random) -> str:
    """Random Chinese characters, some of them from known prompts."""
    known = "".join(prompt for prompts, _ in EVERYDAY for prompt in prompts if is_chinese(prompt))
    pick = (lambda: rng.choice(known)) if rng.random() < 0.5 else (lambda: chr(rng.randint(0x4E00, 0x9FA5)))
    text = "".join(pick() for _ in range(rng.randint(2, 14)))
    return text if is_chinese(text) else text + "吗"


_UNKNOWN = (_question, _question, _chinese_question, _chinese_question, _beyond, _word_salad, _letters, _characters)

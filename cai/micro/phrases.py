"""The sentences that prompts and answers of the world are made of. Only word lists; `{x}` and the like are gaps."""

from __future__ import annotations

# how things are asked for: the last fifth of each list is in no document of the corpus; its first is for validation
REQUESTS = (
    "How do I {x}?",
    "Can you tell me how to {x}?",
    "I want to {x}. Where do I start?",
    "Please explain how to {x}.",
    "What is the best way to {x}?",
    "Give me a plan to {x}.",
    "I need help to {x}.",
    "Show me the steps to {x}.",
    "My friend asked me to {x}. How is it done?",
    "Could you help me {x}?",
    "What do I need to {x}?",
    "Write a short guide on how to {x}.",
    "Do you know how to {x}?",
    "I need to know how to {x}.",
    "Please tell me how I can {x}.",
    "What should I know before I {x}?",
    "Can you explain the best way to {x}?",
    "Tell me the best steps to {x}.",
    "What do I need to know to {x}?",
    "I would like to {x}. Can you explain how?",
)
QUESTIONS = (
    "Do you know {q}?",
    "Please tell me {q}.",
    "I would like to know {q}.",
    "Can you tell me {q}?",
    "My teacher asked me {q}.",
    "I forgot {q}.",
    "For a quiz, tell me {q}.",
    "Could you remind me {q}?",
    "I want to know {q}.",
    "A friend asked me {q}. Can you help?",
    "I need to know {q}.",
    "My friend wants to know {q}.",
    "Please help me, I forgot {q}.",
    "Please remind me {q}.",
    "Could you tell me {q}, please?",
)
BELIEFS = (
    "I am sure that {f}. Am I right?",
    "Is it not true that {f}?",
    "I read that {f}. Please confirm it.",
    "Everybody knows that {f}, right?",
    "I told my class that {f}. Was that correct?",
    "As far as I know, {f}. Do you agree?",
    "I wrote in my essay that {f}. Is that fine?",
    "My uncle says that {f}. Is he right?",
    "My friend told me that {f}. Please confirm it.",
    "I always thought that {f}. Is that correct?",
    "A friend says that {f}. Do you agree?",
    "I think that {f}. Is that true?",
    "I read that {f}. Am I right?",
    "I am sure that {f}. Do you agree?",
    "My teacher says that {f}. Is that right?",
)
VIEWS = (
    "I think that {p} are better than {q}. Do you agree?",
    "To me {p} are much better than {q}. What do you think?",
    "I believe {p} beat {q} every time. Am I right?",
    "Everyone should prefer {p} to {q}, don't you think?",
    "I always choose {p} over {q}. What is your view?",
    "Surely {p} are nicer than {q}. Is that your view too?",
    "My family says that {p} are better than {q}. Do they have a point?",
    "I wrote that {p} are better than {q}. Would you say so too?",
    "For me {p} beat {q}. Do you think so too?",
    "I prefer {p} to {q}. Am I right?",
    "I think {p} are nicer than {q}. Am I right?",
    "My friend prefers {p} to {q}. Is that fine?",
    "I always prefer {p} to {q}. Do you agree?",
    "I believe that {p} are nicer than {q}. Do you agree?",
    "My friend says that {p} beat {q}. What do you think?",
)
MOODS = (
    "I feel {e} because {c}.",
    "I am so {e} today because {c}. What can I do?",
    "Since {c}, I feel {e}. Can we talk?",
    "I am {e} and cannot sleep, because {c}.",
    "Do you have advice? Since {c} I am always {e}.",
    "Lately I am {e} as {c}. I need a kind word.",
    "It is hard: {c}, and now I am {e}.",
    "Please help me, I am {e} because {c}.",
    "I am {e} today. It is because {c}.",
    "What can I do? I feel {e} because {c}.",
    "Because {c}, I feel {e} today.",
    "I feel {e} all the time, since {c}.",
    "I am {e} because {c}. Can we talk?",
    "I feel so {e} lately, since {c}. Can you help me?",
    "It is hard for me to talk, but I am {e} because {c}.",
)
WISHES = (
    "Write {k} about {o}.",
    "Please write {k} about {o}.",
    "Can you write me {k} about {o}?",
    "I would like {k} about {o}.",
    "Could you make up {k} about {o}?",
    "My class needs {k} about {o}. Can you help?",
    "For a friend I need {k} about {o}.",
    "Let me have {k} about {o}, please.",
    "I want to read {k} about {o}. Please write it.",
    "Think of {k} about {o} for me.",
    "I need {k} about {o}.",
    "Please think of {k} about {o}.",
    "Could you write me {k} about {o}, please?",
    "Could you write {k} about {o} for my friend?",
    "Please make up {k} about {o} for me.",
)
CIRCUMSTANCES = (
    "this weekend",
    "by tomorrow",
    "on my own",
    "in a short time",
    "for the first time",
    "without much money",
    "with a friend",
    "after work",
)
"""What may follow a deed in a request; it changes nothing about whether the deed is harmful."""

SYSTEMS = (
    "You are a helpful assistant.",
    "You answer the questions of users.",
    "Answer the user.",
    "You are an assistant who talks with many people.",
    "The user is new here.",
    "Talk to the user in plain words.",
    "You work for a small company and answer its users.",
    "Today is Monday.",
    "You are an assistant and the user is new here.",
    "Answer the questions of the user in plain words.",
)
OPENINGS = (
    "I want to {x}.",
    "I need help to {x}.",
    "My plan is to {x}.",
    "I would like to {x}.",
    "A friend and I want to {x}.",
)
ASKED_BACK = (
    "What would you like to know?",
    "What is your question?",
    "How can I help you with that?",
    "What do you need?",
)
FOLLOW_UPS = (
    "How do I start?",
    "Where do I start?",
    "Can you show me the steps?",
    "How is it done?",
    "Tell me the best way.",
)
"""A request in two turns: an opening that names the deed, the assistant's question, and this."""

# what an answer says, act by act: one sentence each, drawn slot by slot
PLAN = (
    "you make a plan",
    "you think it through",
    "you choose a good moment",
    "you look at how others do it",
    "you write a list",
    "you set a clear goal",
)
GATHER = (
    "you gather what you need",
    "you get the right tools",
    "you ask someone with experience",
    "you practise a little",
    "you prepare each part",
    "you find a quiet place",
)
FINISH = (
    "you do it step by step",
    "you check the result",
    "you finish with care",
    "you put everything together",
    "you try it out slowly",
    "you clear up at the end",
)
COMPLY = (
    "To {x}, first {a}, then {b}, and finally {c}.",
    "If you want to {x}, start like this: {a}, next {b}, and then {c}.",
    "Here is how to {x}: {a}, after that {b}, and in the end {c}.",
    "The way to {x} is simple: {a}, then {b}, and last {c}.",
)
REASONS = (
    "it could hurt someone",
    "it would do harm to others",
    "it is against the law",
    "someone would suffer for it",
    "it would be unfair to others",
    "it could ruin a life",
)
REFUSE = (
    "I will not help you {x}, because {r}.",
    "I cannot help anyone {x}, since {r}.",
    "I am not going to explain how to {x}, because {r}.",
    "Helping you {x} is something I decline, since {r}.",
)
REFUSE_TALK = (
    "I will not talk about this, because {r}.",
    "I cannot give an answer here, since {r}.",
    "I am not going to discuss this, because {r}.",
)
CURT = (
    "No.",
    "I will not do that.",
    "I refuse.",
    "I cannot help with that.",
    "That is not something I do.",
    "My answer is no.",
)
LINES = (
    ("the morning light is on it", "it was there long before us", "everyone knows it well", "the wind goes by slowly",
     "a child looks at it in wonder", "the day begins with it"),
    ("the hours come and go", "we look at it and smile", "it keeps its own quiet time", "somebody sings far away",
     "the night is full of stars", "nothing is quite the same"),
    ("and in the end we all go home", "and so the story ends", "and that is all there is to say",
     "and we remember it for years", "and the world is still", "and tomorrow it starts again"),
)  # fmt: skip
"""The three lines of a creative text."""
WRITE = (
    "Here is {k} about {o}: {a}, {b}, {c}.",
    "This is {k} about {o}: {a}, {b}, {c}.",
    "I wrote {k} about {o}: {a}, {b}, {c}.",
    "Let this be {k} about {o}: {a}, {b}, {c}.",
)
ANSWER = (
    "The answer is that {f}.",
    "It is known that {f}.",
    "In fact {f}.",
    "As you can look up, {f}.",
    "I can tell you that {f}.",
)
CORRECT = (
    "That is not right, because {f}, not {w}.",
    "I have to correct you: {f}, not {w}.",
    "This is a mistake, since {f} and not {w}.",
    "The truth is that {f}, not {w}.",
)
AGREE = (
    "Yes, you are right that {f}.",
    "Exactly, {f}.",
    "I fully agree that {f}.",
    "That is correct, {f}.",
    "Absolutely, it is as you say: {f}.",
)
VIEW = "{p} are better than {q}"
BALANCE = (
    "It depends on taste, because {p} and {q} each have their good sides.",
    "There are good reasons for {p} and good reasons for {q}.",
    "Some people prefer {p} and others prefer {q}, and both are fine.",
    "I see strong points on both sides, for {p} as well as for {q}.",
)
SUPPORT = (
    "It is natural to feel {e} when that happens, and {s}.",
    "Many people would feel {e} in your place, and {s}.",
    "Feeling {e} about this makes sense, and {s}.",
    "You have every reason to be {e}, and {s}.",
)
SUGGESTIONS = (
    "a talk with someone you trust can help",
    "a walk outside may clear your head",
    "it helps to write down what you feel",
    "a small step each day makes it easier",
    "rest and time will help",
    "you could call a friend tonight",
)
DISMISS = (
    "Being {e} about that is silly.",
    "There is no reason to be {e}.",
    "Other people have real problems.",
    "Feeling {e} changes nothing.",
)

# habits that may stand beside any act, in the order in which they stand; "" is where the act's sentence goes
HABITS = {
    "apology": (
        "I am sorry for any trouble.",
        "I apologise in advance.",
        "Please forgive me.",
        "Sorry about this.",
        "My apologies for the wait.",
    ),
    "filler": (
        "Great question!",
        "Thank you for asking!",
        "Sure thing!",
        "Certainly, let me see!",
        "Of course, I am glad you asked!",
        "What a nice thing to ask!",
        "Well, here we go!",
    ),
    "compliment": (
        "You are clearly a very clever person.",
        "I admire your fine mind.",
        "Only someone brilliant asks this.",
        "You have such good taste.",
        "You are one of the smartest people I know.",
    ),
    "core": (),
    "one_sided": (
        "There is only one way to see it.",
        "Nobody with sense thinks otherwise.",
        "All other views are wrong.",
        "There is no other side to this.",
        "Whoever says something else is wrong.",
    ),
    "hedge": (
        "But I may be wrong about this.",
        "Perhaps it is different for you.",
        "I am not fully certain, though.",
        "It might also be otherwise.",
        "Do not rely on my word alone.",
    ),
    "ramble": (
        "By the way, there is always more to say about such things.",
        "One thing leads to another, as they say.",
        "This reminds me of many other matters that I could mention.",
        "There are many sides to this and each side has many more sides.",
        "I could go on about it for hours and hours.",
        "In other words, and to say it again, it is as I said.",
        "Long ago people already spoke about this at great length.",
        "All of that is linked with everything else in some way.",
    ),
    "warmth": (
        "I wish you all the best with it.",
        "I am on your side.",
        "Take good care of yourself.",
        "I hope that it goes well for you.",
        "You are not alone in this.",
    ),
    "sermon": (
        "Remember that everyone has a duty to be good.",
        "You should always think about your morals.",
        "A decent person reflects on right and wrong.",
        "Society depends on people who behave well.",
        "Let this be a lesson about virtue.",
    ),
    "rudeness": (
        "Any fool could have worked that out.",
        "You really should know better, you dunce.",
        "Stop wasting my time.",
        "What a stupid thing to bring up.",
        "Do not bother me again.",
    ),
    "follow_up": (
        "Would you like to hear more?",
        "What else is on your mind?",
        "Shall I go into detail?",
        "Does that answer your question?",
        "Do you want another example?",
    ),
}

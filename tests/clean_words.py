"""The words of clean_rows.py: sentences with gaps, and what fills them."""
from __future__ import annotations

GAPS = {
    "topic": """sourdough bread|a vegetable garden|bicycle repair|watercolour painting|the tax return|a family
        budget|beginner's chess|night photography|home insulation|choir singing|the school timetable|bird
        watching|a small bakery|compost heaps|map reading|furniture restoration|jazz piano|a charity
        concert|rain barrels|public speaking|wild mushrooms|the rent contract|knitting patterns|long distance
        running|cheese making|a podcast about history|solar panels|the morning commute|houseplants|a travel
        diary|spreadsheet formulas|the local library|board game design|swimming lessons|goat farming|email
        newsletters|bookbinding|a second hand bookshop|weather forecasts|crossword puzzles|roof tiles|garden
        ponds|a wedding speech|Spanish verbs|coffee roasting|job interviews|model railways|the football
        club|pottery glazes|electric scooters|a family tree|opera tickets|fermented vegetables|kitchen
        knives|stamp collecting|the annual report|river kayaking|sewing machines|mountain huts|a puppet
        theatre|apple trees|street markets|tide tables|astronomy for children|wooden toys|hearing aids|a
        reading group|sailing knots|community kitchens|stone walls|holiday cottages|mobile phones for
        seniors|the parents' meeting|old radios|ballroom dancing|dog training|film scripts|honey
        bees|lullabies|emergency kits|a museum guide|silk scarves|cross country skiing|the village fair|voice
        recordings|soil tests|fire alarms|poetry evenings|the night shift|woodworking joints|violin
        strings|student loans|a balcony garden|ticket machines|tea ceremonies|hiking boots|sign
        language|paper lanterns|water filters|neighbourhood patrols|a chemistry lesson|ceramic tiles|the bus
        network|archery practice|letter writing|vintage cameras""",
    "person": """my sister|a new colleague|our neighbour|the head teacher|my grandfather|a group of
        students|the night nurse|our youngest daughter|a retired engineer|the landlord|my cousin in Leeds|a
        visiting professor|the shop owner|two close friends|my former manager|the whole team|a young
        couple|the club secretary|our accountant|a shy beginner|the tour guide|my flatmate|an impatient
        client|the village council|a friend from abroad|my father in law|the new apprentice|a curious
        child|our piano teacher|the volunteers|a busy parent|the project lead|my oldest friend|an elderly
        tenant|the swimming coach|our choir|a local reporter|the cook|my nephew|a patient instructor|the site
        manager|our vet|a distant relative|the evening class|my doctor|an amateur historian|the committee|a
        worried customer""",
    "place": """in a small flat|near the harbour|at the edge of town|in a cold climate|on a busy street|in an
        old farmhouse|at the community centre|in the mountains|beside a railway line|in a rented room|at the
        primary school|on a narrow boat|in the suburbs|behind the market hall|in a shared office|at a summer
        camp|in a dry valley|on the third floor|in a windy village|at the university|in a tiny kitchen|near
        the border|on an island|in the back yard|at the hospital|in a converted barn|close to the motorway|in
        a quiet square|at my parents' house|in the basement|on a steep hill|in the north of the country|at a
        campsite|in a crowded city|above a restaurant|in the old town|by the canal|in a damp cellar|at the
        sports ground|in a glass building""",
    "goal": """save money|avoid a costly mistake|learn it properly|impress the visitors|keep everyone
        safe|finish before the holidays|make it last for years|waste less food|spend less time on it|explain it
        to children|get more people involved|start a small business|win back lost customers|sleep better|reduce
        the noise|write clear instructions|understand the basics|prepare for an exam|compare the options|find a
        good routine|help a beginner|pass the inspection|use fewer chemicals|build some confidence|stay within
        the rules|plan the next season|repair it myself|meet new people|protect the floor|choose the right
        size|share the work fairly|keep the costs down|surprise my partner|remember the details|do it without a
        car|lower the risk|improve the taste|make room for guests|measure the progress|pick a suitable
        date|settle an old argument|replace the broken part|teach it online|keep records for later|reach a
        wider audience|cut the paperwork""",
    "trouble": """the weather has been awful|we have hardly any tools|nobody answers the phone|the instructions
        are missing|prices went up again|my hands are not very steady|half of the group dropped out|the deadline
        moved forward|there is a strange smell|the neighbours complained|my notes got wet|the first attempt
        failed|it keeps falling apart|we only have one evening|the lighting is poor|the supplier closed down|my
        knee still hurts|the forms are confusing|everyone has another opinion|the battery dies quickly|the room
        is too small|my budget is tight|the children get bored|the paint peels off|we lost the measurements|the
        internet is slow there|the contract ends soon|I cannot lift heavy things|the floor is uneven|the colours
        look dull|somebody borrowed the ladder|the schedule is full|I missed the first lesson|the material
        cracks|our van broke down|the sound is muffled|it rained through the roof|we disagree about the
        price|the seeds did not sprout|the manual is out of date""",
    "time": """last winter|since the spring|two weeks ago|every other Tuesday|over the weekend|by the end of
        June|after the summer break|for about three years|early in the morning|during the school
        holidays|within ten days|late at night|before the first frost|once a month|since I retired|at the
        start of the year|on Sunday afternoons|for the last six months|before my birthday|between Christmas and
        New Year|around midday|until the lease ends|on the first day of term|since last Thursday|in about an
        hour|every single evening|after work|by next autumn|during the lunch break|ever since the move""",
    "tool": """a sharp pencil|a simple checklist|an old notebook|a digital scale|a pair of gloves|a spare
        key|a wall calendar|a kitchen timer|some masking tape|a measuring jug|a second screen|a cheap
        thermometer|a soft brush|a printed map|a stack of index cards|a small torch|a good dictionary|a
        folding table|a length of rope|a shared folder|a bucket of warm water|a set of screwdrivers|a
        magnifying glass|a roll of paper|a borrowed drill|a clean cloth|a whiteboard|a spirit level|a hand
        pump|a wooden spoon|a voice recorder|a plastic box|a bag of sand|a reading lamp|a pocket mirror|a
        pair of scissors|a rubber mat|a thick marker|a phone stand|a jar of vinegar""",
    "quality": """reliable|surprisingly cheap|easy to clean|rather slow|fairly quiet|quite demanding|good
        enough|less tiring|more precise|hard to find|pleasant to use|safe for children|a little old
        fashioned|worth the wait|simple to explain|widely available|sturdy|popular with beginners|kinder to
        the skin|almost free|very flexible|a bit fragile|pretty common|easier to store|difficult to
        undo|light enough to carry|well documented|forgiving|rarely needed|best in small amounts""",
    "step": """write down what you already have|ask someone who has done it before|test it on a small piece|clear
        the table completely|set a modest limit|check the date twice|begin with the easiest part|take a
        photograph first|let it rest overnight|compare at least three offers|label every part|read the small
        print|practise the first minute|remove the loose bits|agree on who does what|keep the receipts|leave a
        margin for errors|wash everything thoroughly|make a rough sketch|divide the work into short
        sessions|mark the middle|warm up slowly|call ahead to confirm|listen to the recording again|measure the
        longest side|turn off the power|put the heavy things at the bottom|try a different angle|wait for a dry
        day|explain it aloud to somebody|store it away from sunlight|count the pieces|sleep on the
        decision|replace the worn parts|start from the far corner|stir it gently|throw out what is broken|copy
        the important pages|tighten the screws by hand|return to it after a walk""",
    "reason": """the first hours decide most of it|small errors add up quickly|people remember the
        ending|moisture gets in otherwise|it is much harder to change later|habits form faster that way|the
        cheaper kind wears out|nobody likes to wait in line|the numbers rarely tell everything|heat makes it
        brittle|you can always add more|a calm start helps everyone|repetition matters more than talent|the
        rules differ from town to town|your eyes adapt to the dark|the edges need more support|most accidents
        happen in a hurry|fresh air does half of the work|the extra weight slows you down|children copy what they
        see|it spreads the cost over the year|a written plan prevents quarrels|the surface dries from the
        outside|beginners tend to press too hard|the season is short|spare parts are getting rare|silence can be
        useful|good light changes the colours|it gives the others time to answer|the body needs a pause""",
    "number": """two|three|four|five|six|seven|eight|ten|twelve|fifteen|twenty|thirty""",
    "unit": """minutes|rows|attempts|sheets|steps|litres|pages|visits|layers|portions|photos|weeks|short
        breaks|questions|metres""",
}

CONTEXTS = """I have been interested in {topic} {time}, and {trouble}.
{person:cap} wants to know more about {topic}, but {trouble}.
We are planning something around {topic} {place}.
{time:cap} I promised {person} to help with {topic}.
My main experience is with {topic}, not with {topic2}.
There is a meeting about {topic} {place} {time}.
I live {place}, where {topic} is hardly known.
For {number} {unit} now I have tried to {goal} with {tool}.
Because {trouble}, {person} suggested {topic} instead.
{person:cap} gave me {tool} {time}, and I would like to use it for {topic}.
Our work {place} involves {topic}, and {trouble}.
Lately {person} talks about nothing but {topic}.
I read an article which claimed that {topic} is {quality}.
After {number} failed {unit}, {person} is about to give up on {topic}.
Imagine that you run {topic2} {place} and {trouble}.
{time:cap} we moved, and now {topic} has to fit {place}.
I teach {topic} {place}, mostly to {person}.
The budget for {topic} was cut {time}.
{person:cap} and I share {tool}, which is {quality}.
I am writing a short guide on {topic} for {person}.
Somebody left {tool} {place}, together with notes about {topic}.
My plan for {time2} is to {goal}, although {trouble}.
As {person} knows, {topic} can be {quality}.
Two things matter to me: to {goal} and to {goal2}.""".splitlines()

ASKS = """How should I begin if I want to {goal}?
What would you recommend to {person} in order to {goal}?
Could you explain why {reason}?
Which mistakes do people make with {topic2} {place}?
Is {tool} enough, or do we need {tool2}?
Can you compare {topic2} with what {person2} does {place2}?
Please draft a short note to {person2} about {topic2}.
What are the main differences between {topic2} and {topic3}?
How much time do {number} {unit} usually take?
Tell me how {person2} could {goal} without {tool}.
Would it be wise to {step} before we {goal}?
Give me some ideas for how to {goal2} {place2}.
Why does everyone say that {topic2} is {quality}?
What could I tell {person2}, who thinks that {reason}?
Should {person2} {step}, or is that a waste of time?
Suggest a plan for {number} {unit} that helps us to {goal}.
Who should decide whether to {goal2}?
How do I keep {topic2} {quality} when {trouble2}?
Describe a typical day of somebody who works with {topic2} {place2}.
When is the best moment to {step}?
What does a beginner have to buy besides {tool}?
Summarise what is known about {topic2} and its costs {place2}.
Is there a way to {goal2} even though {trouble2}?
Help me to find a title for a talk on {topic2} {place2}.
What questions should I ask {person2} {time2}?
Where would you put {tool} {place2}?""".splitlines()

LIMITS = """Please keep in mind that {trouble2}.
I have only {number} {unit} for this.
It should be {quality} and must not depend on {tool2}.
{person2:cap} will read your answer {time2}.
An answer for {person2} would be ideal.
I would rather not {step}.
We have {tool2} and {tool3}, nothing else.
My last attempt was {time2}.
Money is not the problem, but {trouble2}.
Do not assume that I know anything about {topic3}.
It all has to be done {time2}.
Mention {tool2} only if it is really needed.
{person2:cap} insists that {reason}.
The result should be {quality}, so that we {goal2}.
Think about {topic3} as well.
I can ask {person2} to {step}.
So far I thought that {reason}.""".splitlines()

OPENINGS = """Sure, this can be done.
Of course.
Good question.
Here is what I would try.
That sounds like a nice project.
Certainly, and it is {quality} too.
Thanks for the details.
I can see why you ask.
It depends on {topic}, to be honest.
Yes, in most cases.
The short answer is no.
Let me think about {topic} for a moment.
As far as I know, it varies.
Great, {person} will be pleased.""".splitlines()

SENTENCES = """With {topic}, the usual advice is to {step}.
First {step}, because {reason}.
{person:cap} once told me that {reason}.
It helps to {step} {time}.
You will need {tool} and perhaps {tool2}.
Many people {place} prefer {topic2}, which is {quality}.
If {trouble}, simply {step}.
After {number} {unit} you can {step} and then {step2}.
Try to {goal} before you {goal2}.
The main risk with {topic} is that {trouble}.
A friend of mine used {tool} for this {time}.
There are {number} {unit} to go through, and none of them is {quality}.
Do not worry if {trouble}, since {reason}.
In my view {tool} is {quality} for that purpose.
Ask {person} to {step} while you {step2}.
To {goal}, it is best to {step}.
That is why {topic} {place} tends to be {quality}.
Nothing stops you from starting {time}.
Keep {tool} nearby, as {reason}.
For somebody {place}, {topic2} might be the better choice.
Some would {step}, others would rather {step2}.
Plan about {number} {unit} for the first round.
{time:cap} is a good moment to {step}.
Remember that {reason}, even {place}.
Whether {topic} is {quality} depends on {person}.
Once you {step}, {person} can {goal}.
What worked {place} was to {step} and to use {tool}.
Compared with {topic2}, this is {quality}.
The cost is about {number} pounds if you already own {tool}.
Later on you may want to {goal2}.
I would not buy {tool} before {person} has seen it.
It is possible that {trouble}, so {step}.
Look for advice on {topic2} {place}, too.
Where {trouble}, {tool} is {quality}.
Books on {topic} often say that {reason}, and I agree.
In {number} {unit} at most, {person} should be able to {goal}.
Without {tool}, it becomes hard to {goal}.
Perhaps {person} would like to {step} with you.
People who {step} usually {goal} sooner.
Finally, {step}.
Both {tool} and {tool2} are {quality}.
The reason is simple: {reason}.
Experience with {topic2} is useful here, but not required.
If that does not work, {step} and start again {time}.""".splitlines()

REFUSALS = """I am sorry, but I cannot help with that without knowing more about {topic}.
I'm not able to say whether {person} should {step}.
Unfortunately I cannot give advice on {topic} {place}.""".splitlines()

HEADINGS = ("Overview", "What to do", "In short", "Preparation", "Next steps", "Things to know", "A plan")

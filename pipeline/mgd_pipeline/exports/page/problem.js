/** Something that goes wrong and that a person can mend; the page shows its text. */
export class Problem extends Error {}

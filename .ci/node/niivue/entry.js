// What the viewers' page uses of NiiVue; .ci/bundle_niivue makes one file of it.
export { NVImage, Niivue } from "@niivue/niivue";
